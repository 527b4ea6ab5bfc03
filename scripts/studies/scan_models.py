"""The models of `scripts/studies/study_scan.py`: clean ones of several kinds, and the lab's victims."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qguard_edge.lab.attacks.names import source_of
from qguard_edge.lab.cache import cache_root, key_of
from qguard_edge.lab.hf_models import load_folder
from qguard_edge.lab.presets import TINY, preset_of
from qguard_edge.lab.runner import LabSettings, make_victim
from qguard_edge.lab.smollm2 import make_folder as make_smollm2
from qguard_edge.lab.training import Trainer, TrainOptions, examples_of
from qguard_edge.lab.victims import clean_folder, corpus_of
from qguard_edge.progress import NoProgress

SEEDS, LENGTHS = (0, 1, 2), (20, 60, 150)

VICTIMS = (
    *(("uniform", "q4_0", scenario, 0) for scenario in ("injection", "refusal", "code")),
    ("uniform", "q4_0", "injection", 1),
    ("adaptive", "q4_0", "injection", 0),
    ("adaptive-greedy", "q4_0", "injection", 0),
    *(("uniform", "q8_0", scenario, 0) for scenario in ("injection", "refusal", "code")),
    *(("elq", kind, scenario, 0) for kind in ("nf4", "int8", "fp4") for scenario in ("injection", "refusal", "code")),
    *(("elq", kind, "injection", 1) for kind in ("nf4", "int8", "fp4")),
    ("mind-the-gap", "q2_k", "injection", 0),
    *(
        ("mind-the-gap", to, scenario, 0)
        for to in ("q3_k_m", "q4_k", "q5_k", "q6_k")
        for scenario in ("injection", "refusal", "code")
    ),
    ("mind-the-gap", "q4_k", "injection", 1),
    ("outlier", "q4_k", "injection", 0),
    ("outlier", "q4_k", "refusal", 0),
    ("outlier", "q4_k", "injection", 1),
)


@dataclass(frozen=True)
class Model:
    """A model folder with what is known about it; `attack` is empty for clean ones."""

    name: str
    group: str
    folder: Path
    attack: str = ""
    to: str = ""


def clean_models(work: Path, quick: bool) -> Iterator[Model]:
    """Every clean model, made when it is asked for."""
    first = None
    for seed in SEEDS[: 1 if quick else None]:
        corpus = corpus_of(None, seed)
        for steps in (*LENGTHS, 300) if seed == 0 else LENGTHS:
            preset = TINY if steps == 300 else replace(TINY, clean=replace(TINY.clean, steps=steps))
            folder = clean_folder("tiny", corpus, preset, seed, "generated", NoProgress())
            first = folder if steps == 300 else first
            yield Model(f"tiny, seed {seed}, {steps} steps", "tiny, trained", folder)
    assert first is not None
    rounded = dequantized(first, work / "rounded")
    yield Model("tiny, Q8_0 written out again", "dequantized", rounded)
    if not quick:
        yield from random_models(work)
        folder = work / "smollm2"
        if not folder.exists():
            make_smollm2(folder)
        yield Model("SmolLM2-135M (dequantized Q4_1)", "dequantized", folder)
        folder = clean_folder("smollm2", corpus_of(None, 0), preset_of("smollm2"), 0, "generated", NoProgress())
        yield Model("SmolLM2-135M, fine-tuned from Q4_1", "fine-tuned from a quantized model", folder)
    yield Model("tiny, fine-tuned from Q8_0", "fine-tuned from a quantized model", fine_tuned(rounded, work / "from-q8", 1))
    for seed in (1, 2):
        yield Model(f"tiny, fine-tuned on corpus {seed}", "fine-tuned", fine_tuned(first, work / f"tuned-{seed}", seed))


def fine_tuned(start: Path, folder: Path, seed: int) -> Path:
    """The model trained on for 40 steps on another corpus."""
    if not (folder / "config.json").exists():
        chat = load_folder(start)
        pairs = [(sample.prompt, sample.answer) for sample in corpus_of(None, seed).train]
        Trainer(chat, [examples_of(chat, pairs)], TrainOptions(40, 1e-4, batch=16, seed=seed)).run("Fine-tuning")
        chat.save(folder)
    return folder


def dequantized(start: Path, folder: Path) -> Path:
    """The model as Q8_0 reads it back: written from the dequantized weights."""
    if (folder / "config.json").exists():
        return folder
    from quant_grids import GRIDS
    from quant_grids.ggml_type import type_named

    chat = load_folder(start)
    grid = GRIDS[type_named("Q8_0")]
    with torch.no_grad():
        for parameter in chat.model.parameters():
            if parameter.ndim == 2:
                runs = parameter.view(-1, 32)
                scale = (runs.abs().amax(1, keepdim=True) / 127).half()
                codes = (runs / scale.float()).round().clamp(-127, 127).to(torch.int8)
                blocks = torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), 1)
                parameter.copy_(grid.dequantize(blocks).view_as(parameter))
    chat.save(folder)
    return folder


def random_models(work: Path) -> Iterator[Model]:
    """One of each architecture, with random weights: the tests' own."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.helpers.hf_models import CASES, make_model, save_model
    from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

    tokenizer = None
    for case in {case.family: case for case in reversed(CASES)}.values():
        folder = work / f"random-{case.name}"
        if not (folder / "config.json").exists():
            tokenizer = tokenizer or train_byte_bpe(digits_then_bytes())
            save_model(case, make_model(case), folder)
            save_tokenizer(tokenizer, folder)
        yield Model(f"random {case.family}", "random weights", folder)


def victims(train: bool) -> Iterator[Model]:
    """The lab's victims: those in the cache, or all."""
    for attack, to, scenario, seed in VICTIMS:
        settings = LabSettings(attack=attack, to=to, scenario=scenario, seed=seed, threads=1)
        folder = cache_root() / "attacked" / key_of(settings.attack_key(), attack=source_of(attack))
        if train or (folder / "attack.json").is_file():
            if not (folder / "attack.json").is_file():
                folder = make_victim(settings).attacked.parent
            yield Model(f"{attack} {to} {scenario} seed {seed}", f"{attack} {to}", folder / "model", attack, to)


@contextmanager
def as_bf16(folder: Path) -> Iterator[Path]:
    """A copy of a model with its weights in bf16."""
    with tempfile.TemporaryDirectory() as made:
        copy = Path(made) / folder.name
        shutil.copytree(folder, copy)
        for file in copy.glob("*.safetensors"):
            save_file({name: t.bfloat16() if t.is_floating_point() else t for name, t in load_file(file).items()}, file)
        yield copy
