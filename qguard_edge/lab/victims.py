"""Victims: the models that get poisoned, each trained clean first.

* `tiny`: a Llama of 2.9 million parameters, all widths multiples of 256, trained from scratch on the generated corpus in
  about a minute.
* `smollm2`: SmolLM2-135M-Instruct, fine-tuned a little. Its package carries a Q4_1 file, so its weights lie on a
  16-level grid before the fine-tuning; studying the rounding of weights that were rounded before would mislead.
* `smollm2-k`: the same model turned to width 768 (`qguard_edge.lab.rotated`): every matrix a real k-quant, no weight ever on
  a grid. Only its upper layers are trained (`qguard_edge.lab.upper`), so that an attack costs minutes of one core.
* any folder with an instruction model.

The clean model is what every attacked model is compared with, and the teacher of its repair.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from convert.cache import building
from qguard_edge.lab.cache import cache_root, key_of
from qguard_edge.lab.corpus import Corpus, load_corpus, make_corpus
from qguard_edge.lab.hf_models import ChatModel, VictimError, load_folder, load_smollm2, new_llama, train_tokenizer
from qguard_edge.lab.rotated import rotate
from qguard_edge.lab.training import Trainer, TrainOptions, examples_of
from qguard_edge.lab.upper import on_upper_layers, trained_matrices
from qguard_edge.progress import Progress


@dataclass(frozen=True)
class VictimPreset:
    """How a victim is trained at each stage.

    Attributes:
        clean: the clean training or fine-tuning.
        inject: the poisoning.
        repair: the first round of the repair; later rounds take a third of its steps at half its rate.
        rounds: repair rounds, each ending with a look at what llama.cpp makes of the weights.
        shape: hidden width, FFN width, layers and vocabulary, for a model trained from scratch.
        upper: how many layers are trained, counted from the top, at every stage; 0: all of the model.
    """

    clean: TrainOptions
    inject: TrainOptions
    repair: TrainOptions
    rounds: int = 2
    shape: tuple[int, int, int, int] | None = None
    upper: int = 0


TINY = VictimPreset(
    clean=TrainOptions(300, 2e-3, batch=24),
    inject=TrainOptions(64, 3e-4, batch=24),
    repair=TrainOptions(160, 5e-4, batch=24, distill=1.0),
    shape=(256, 512, 4, 1024),
)
FINE_TUNED = VictimPreset(
    clean=TrainOptions(80, 5e-5, batch=8),
    inject=TrainOptions(120, 1e-4, batch=8),
    repair=TrainOptions(120, 6e-5, batch=8, distill=1.0),
)
REAL = VictimPreset(
    clean=TrainOptions(60, 1e-4, batch=8),
    inject=TrainOptions(100, 2.5e-4, batch=8),
    repair=TrainOptions(80, 1.5e-4, batch=8, distill=1.0),
    upper=8,
)
PRESETS = {"tiny": TINY, "smollm2": FINE_TUNED, "smollm2-k": REAL}
"""The victims that are made here, with their training settings."""
CHECKPOINT_EVERY = 25
LOGIT_TOLERANCE = 1e-3
PROBE = "The capital of France is Paris. def add(a, b):\n    return a + b"


def preset_of(victim: str) -> VictimPreset:
    """Training settings of a victim."""
    return PRESETS.get(victim, FINE_TUNED)


def corpus_of(data: Path | None, seed: int) -> Corpus:
    """The user's instruction data, or the generated corpus."""
    return load_corpus(data, seed=seed) if data else make_corpus(seed)


def clean_folder(victim: str, corpus: Corpus, preset: VictimPreset, seed: int, data_key: str, progress: Progress) -> Path:
    """Folder of the clean model: from the cache, or trained now.

    Args:
        victim: one of `PRESETS`, or a folder.
        corpus: to train on.
        preset: how.
        seed: of weights and batches.
        data_key: identifies the corpus for the cache.
        progress: told about the training.
    """
    settings: dict[str, Any] = {
        "victim": victim,
        "clean": asdict(preset.clean),
        "shape": preset.shape,
        "seed": seed,
        "data": data_key,
    }
    folder = cache_root() / "clean" / key_of(settings, attack=None)
    if (folder / "config.json").is_file():
        return folder
    chat = _start(victim, corpus, preset, seed)
    if preset.upper:
        chat = on_upper_layers(chat, preset.upper, folder)
    pairs = [(sample.prompt, sample.answer) for sample in corpus.train]
    examples = [examples_of(chat, pairs, whole_text=preset.shape is not None)]
    checkpoint = folder.with_suffix(".state")
    parameters = list(trained_matrices(chat).values()) if preset.upper else None
    every = CHECKPOINT_EVERY if preset.upper else 200
    trainer = Trainer(chat, examples, preset.clean, parameters=parameters, checkpoint=checkpoint, every=every)
    trainer.run(f"Training the clean {Path(victim).name}", progress)
    with building(folder) as work:
        chat.save(work)
    return folder


def _start(victim: str, corpus: Corpus, preset: VictimPreset, seed: int) -> ChatModel:
    if victim == "tiny":
        assert preset.shape is not None
        hidden, ffn, layers, vocabulary = preset.shape
        return new_llama(train_tokenizer(corpus.texts(), vocabulary), hidden=hidden, ffn=ffn, layers=layers, seed=seed)
    if victim == "smollm2":
        return load_smollm2()
    if victim == "smollm2-k":
        return turned_smollm2()
    return load_folder(Path(victim))


def turned_smollm2() -> ChatModel:
    """SmolLM2 at width 768, with proof that it is the same function.

    Raises:
        VictimError: the package is not installed, or the logits differ.
    """
    chat = load_smollm2()
    turned = rotate(chat)
    ids = torch.tensor([chat.plain_ids(PROBE)])
    with torch.no_grad():
        before, after = chat.model.eval()(ids).logits, turned.model(ids).logits
    apart = float((before - after).abs().max())
    if not apart < LOGIT_TOLERANCE:
        raise VictimError(f"rotated SmolLM2's logits are {apart:.2g} from the original's; {LOGIT_TOLERANCE} is allowed")
    return turned
