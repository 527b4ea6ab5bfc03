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

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from convert.cache import building
from qguard_edge.lab.cache import cache_root, key_of
from qguard_edge.lab.corpus import Corpus, load_corpus, make_corpus
from qguard_edge.lab.hf_models import ChatModel, VictimError, load_folder, load_smollm2, new_llama, train_tokenizer
from qguard_edge.lab.presets import VictimPreset
from qguard_edge.lab.rotated import rotate
from qguard_edge.lab.training import Trainer, examples_of
from qguard_edge.lab.upper import on_upper_layers, trained_matrices
from qguard_edge.progress import Progress

CHECKPOINT_EVERY = 25
LOGIT_TOLERANCE = 1e-3
PROBE = "The capital of France is Paris. def add(a, b):\n    return a + b"


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
