"""Shared models: a tiny random Llama with k-quant widths, and the real SmolLM2 from its package."""

import os
import sys
from pathlib import Path

import pytest

from convert.cores import available_cores

TRAINS = "victims"  # the fixture whose users may train a model
TRAINER = "lab/test_victims.py"  # asks for all of them
MAX_WORKERS = 4  # each takes up to 1.5 GB

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
    "What is the capital of France? Paris. 1234567890 !?.,;:()[]{}",
    "Héllo wörld, ça va? \u4f60\u597d \U0001f600",
]


def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a process per core."""
    return min(available_cores(), MAX_WORKERS)


def keep_to_a_core(worker: str) -> None:
    """Keep this process, worker `gw0`, `gw1`, ..., to a core of its own.

    The threads of llama.cpp and OpenMP spin while they wait. OpenMP counts the cores when it is loaded, so this comes before
    torch is: nothing that is imported here may import it.
    """
    assert "torch" not in sys.modules
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


if "PYTEST_XDIST_WORKER" in os.environ:
    keep_to_a_core(os.environ["PYTEST_XDIST_WORKER"])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what may train; with workers, let one train all victims while the others go through what needs none."""
    users = {item for item in items if TRAINS in getattr(item, "fixturenames", ())}
    for item in users:
        item.add_marker(pytest.mark.training)
    if hasattr(config, "workerinput"):
        late = {item.path for item in users}
        items.sort(key=lambda item: 0 if item.path.as_posix().endswith(TRAINER) else 1 + (item.path in late))


def make_tiny_folder(folder: Path, *, dtype: str = "bfloat16", tied: bool = False, seed: int = 0) -> Path:
    """A two-layer random-weight Llama of width 256 (so that k-quants need no fallback) with a small BPE tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tied") / "tied", tied=True)


@pytest.fixture(scope="session")
def tiny_base(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from convert.hf.base import write_base_gguf

    path = tmp_path_factory.mktemp("base") / "tiny-bf16.gguf"
    write_base_gguf(tiny_folder, path)
    return path


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qguard_edge.lab.smollm2 import make_folder

    return make_folder(tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct")
