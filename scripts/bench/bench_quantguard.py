"""Time and memory of learned rounding, beside what `--dry-run` promised.

Run: python scripts/bench/bench_quantguard.py --to q4_0 --steps 100 --samples 128 --seqlen 256
     python scripts/bench/bench_quantguard.py --random 1b --device cuda

The model is SmolLM2-135M from its package, or a Llama of random weights in the shape of one of 1 or 8 billion parameters
(for time and memory alone: the plan means nothing). The calibration text is that of the lab's corpus, joined so that
every sample fills its length. Markdown on standard output; the last line is one JSON object.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from convert.ftypes import parse_file_type
from convert.quantizer import QuantizeOptions
from convert.source import open_base
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import QuantGuardOptions
from qguard_edge.lab.corpus import make_corpus
from qguard_edge.lab.hf_models import load_smollm2
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.learned.memory import bytes_needed, seconds_needed, size_of_gguf
from qguard_edge.progress import NoProgress
from qguard_edge.runtimes.devices import resolve_device

SHAPES = {"1b": (2048, 8192, 16, 32, 8), "8b": (4096, 14336, 32, 32, 8)}
"""Hidden width, FFN width, layers, heads and key-value heads of Llama 3.2 1B and Llama 3.1 8B."""
VOCABULARY = 49152


class Watch(NoProgress):
    """When each stage of learning began."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}

    def stage(self, name: str, total: int, unit: str) -> None:
        """See `Progress.stage`."""
        self.began[name] = time.monotonic()


def model_folder(random: str, work: Path) -> Path:
    """SmolLM2, or random weights with its tokenizer."""
    chat = load_smollm2()
    if random:
        from transformers import LlamaConfig, LlamaForCausalLM

        hidden, ffn, layers, heads, shared = SHAPES[random]
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=shared,
            tie_word_embeddings=True,
        )
        chat.model = LlamaForCausalLM(config).bfloat16()
    chat.save(work / "model")
    return work / "model"


def text_file(path: Path, samples: int, seqlen: int) -> Path:
    """Texts of at least `seqlen` tokens: a word is a token or more."""
    words = " ".join(f"{sample.prompt} {sample.answer}" for sample in make_corpus(0).train).split()
    words = words * (samples * seqlen // len(words) + 1)
    rows = [" ".join(words[i * seqlen : (i + 1) * seqlen]) for i in range(samples)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default="q4_0")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--scope", choices=("model", "block"), default="model")
    parser.add_argument("--random", choices=("", *SHAPES), default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    with tempfile.TemporaryDirectory() as name:
        work, watch = Path(name), Watch()
        folder = model_folder(arguments.random, work)
        options = QuantGuardOptions(steps=arguments.steps, scope=arguments.scope)
        text = text_file(work / "text.jsonl", arguments.samples, arguments.seqlen)
        calibration = CalibrationOptions(text, arguments.samples, arguments.seqlen)
        quantize = QuantizeOptions(parse_file_type(arguments.to), threads=arguments.threads)
        plain = GgufRequest(
            model=str(folder),
            options=QuantizeOptions(parse_file_type("bf16")),
            defense=options,
            outfile=str(work / "base.gguf"),
        )
        convert_model(plain)
        size = size_of_gguf(open_base(work / "base.gguf", False))
        promised = bytes_needed(size, options, calibration), seconds_needed(size, options, calibration, device)
        out = str(work / "out.gguf")
        request = GgufRequest(
            model=str(folder),
            options=quantize,
            defense=options,
            outfile=out,
            device=arguments.device,
            seed=0,
            calibration=calibration,
        )
        started = time.monotonic()
        report = convert_model(request, watch)
        finished = time.monotonic()
    assert report.activations is not None
    chosen = next(began for stage, began in watch.began.items() if stage.startswith("Choosing the rounding"))
    learning = next((began for stage, began in watch.began.items() if stage.startswith("Learning the rounding")), chosen)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    gpu = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    found: dict[str, Any] = {
        "model": arguments.random or "smollm2",
        "weights": size.weights,
        "to": arguments.to,
        "scope": arguments.scope,
        "steps": arguments.steps,
        "tokens": report.activations.tokens,
        "threads": arguments.threads,
        "device": device.type,
        "seconds_start": learning - started,
        "seconds_per_step": (chosen - learning) / max(1, arguments.steps),
        "seconds": finished - started,
        "peak_gib": peak,
        "gpu_gib": gpu,
        "promised_gib": promised[0] / 2**30,
        "promised_seconds": promised[1],
        "kl_first_last": [report.learned.losses[0][0], report.learned.losses[-1][0]] if report.learned else None,
        "moved": report.learned.moved if report.learned else 0,
        "entropy_bits": report.entropy_bits,
    }
    print(
        "| model | weights | type | scope | steps | s before the first | s per step | s in all | peak GiB | promised GiB | s |"
    )
    print("|---" * 11 + "|")
    print(
        f"| {found['model']} | {size.weights / 1e6:.0f} M | {arguments.to} | {arguments.scope} | {arguments.steps} "
        f"| {found['seconds_start']:.0f} | {found['seconds_per_step']:.1f} | {found['seconds']:.0f} | {gpu or peak:.1f} "
        f"| {found['promised_gib']:.1f} | {promised[1] or 0:.0f} |"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
