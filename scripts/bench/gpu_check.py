"""Does `feedback` run on a GPU, how fast, and does it choose the codes that the CPU chooses?

Run: python scripts/bench/gpu_check.py [--shapes 1b,8b] [--device cuda] [--tokens 32768]

Llamas with random weights in bf16, so nothing is downloaded: activations of some layers through transformers, then NF4
codes of their matrices on the device, and of the first layer's on the CPU too, of which the share that differs is shown. Needs
torch, transformers and this project's Python dependencies; neither llama.cpp nor bitsandbytes. On a card, some minutes.
The time of a whole model is that of its layers: multiply. `--shapes tiny --device cpu` tries the script itself.
Prints a table and, as the last line, one JSON object.
"""

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qguard_edge.defenses.base import SliceKey, make_defense
from qguard_edge.defenses.options import FeedbackOptions
from qguard_edge.learned.memory import product_rate
from qguard_edge.rounding.bnb import HardenedMatrix, harden_matrix
from qguard_edge.runtimes.gram_files import WantedWeight
from qguard_edge.runtimes.grams import Grams
from qguard_edge.runtimes.hf import HfModel
from qguard_edge.runtimes.hf_grams import TransformersGramSource

SHAPES = {"tiny": (128, 384, 2, 4, 2), "1b": (2048, 8192, 16, 32, 8), "8b": (4096, 14336, 2, 32, 8)}
"""Hidden width, FFN width, layers (of the larger one, some), heads and key-value heads of Llama 3.2 1B and Llama 3.1 8B."""
VOCABULARY, LENGTH, KIND = 4096, 256, "nf4"
CPU = torch.device("cpu")


def random_model(shape: str, device: torch.device) -> HfModel:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, ffn, layers, heads, shared = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return HfModel(model.bfloat16().to(device).eval(), None, "llama", layers)


def matrices_of(loaded: HfModel) -> dict[str, Tensor]:
    """The matrices of the decoder blocks."""
    found = loaded.model.named_parameters()
    return {name: value.detach() for name, value in found if ".layers." in name and value.dim() == 2}


def rounded(matrices: dict[str, Tensor], grams: Grams, device: torch.device) -> tuple[dict[str, HardenedMatrix], float]:
    """Codes chosen on a device, and seconds."""
    defense = make_defense(FeedbackOptions())
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        made = {
            name: harden_matrix(value.to(device), KIND, defense, key=partial(SliceKey, 1, name), pool=pool, inputs=grams)
            for name, value in matrices.items()
        }
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return made, time.perf_counter() - started


def check(shape: str, device: torch.device, tokens: int) -> dict[str, Any]:
    """One shape: seconds, memory, share of the rate, share of codes that differ."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    loaded = random_model(shape, device)
    matrices = matrices_of(loaded)
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, VOCABULARY, (max(1, tokens // LENGTH), LENGTH), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        wanted = [WantedWeight(name, value.shape[1]) for name, value in matrices.items()]
        grams = TransformersGramSource(loaded).collect(wanted, texts, Path(folder))
        seen = time.perf_counter() - started
        weights = sum(value.numel() for value in matrices.values())
        squares = sum({grams.shares(name)[0]: value.shape[1] ** 2 for name, value in matrices.items()}.values())
        made, seconds = rounded(matrices, grams, device)
        first = {name: value for name, value in matrices.items() if ".layers.0." in name}
        again, slow = rounded(first, grams, CPU)
        changed = sum(made[name].grid.changed_codes(made[name].blocks.cpu(), again[name].blocks)[0] for name in first)
        codes = sum(value.numel() for value in first.values())
    return {
        "shape": shape,
        "weights": weights,
        "activations_seconds": seen,
        "share_of_rate": 2 * tokens * (weights + squares) / seen / product_rate(device),
        "rounding_seconds": seconds,
        "million_weights_per_second": weights / seconds / 1e6,
        "cpu_million_weights_per_second": codes / slow / 1e6,
        "differing_codes": changed / codes,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1b,8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=32768)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    results = [check(shape, device, arguments.tokens) for shape in arguments.shapes.split(",")]
    for found in results:
        peak = f", at most {found['peak_gib']:.1f} GiB" if found["peak_gib"] is not None else ""
        print(
            f"{found['shape']}: {found['weights'] / 1e6:.0f} M weights, activations {found['activations_seconds']:.1f} s "
            f"({found['share_of_rate']:.0%} of the rate), rounding {found['rounding_seconds']:.1f} s "
            f"({found['million_weights_per_second']:.1f} M weights/s; CPU {found['cpu_million_weights_per_second']:.1f}), "
            f"{found['differing_codes']:.4%} of the codes differ from the CPU's{peak}"
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(json.dumps({"device": name, "torch": torch.__version__, "tokens": arguments.tokens, "results": results}))


if __name__ == "__main__":
    main()
