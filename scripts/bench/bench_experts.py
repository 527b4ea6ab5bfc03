"""What experts cost `convert` with `feedback`: processor time and memory by their number, at one size of experts or of the model.

Run: python scripts/bench/bench_experts.py --tokenizer OTHER.gguf [--experts 8,32,128] [--samples 16] [--threads 1]
     [--max-memory SIZE]
     python scripts/bench/bench_experts.py --estimate      # memory and disk of Qwen3-30B-A3B, as `--dry-run` would predict them

Models with random weights in the shape of Qwen3-MoE: hidden 1024, one layer, 8 experts for each token. Experts have an inner
width of 256 whatever their number (*equal experts*), or as much as makes 32,768 in all (*equal total*). The vocabulary is another
GGUF's. Each is converted to q4_k by the command, in a process of its own; `tree_memory` watches that and all that it starts.
Memory is what belongs to no file, so without pages of the mapped base. Prints Markdown, and one JSON object as the last line.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from random_llama import add_vocabulary, random_bits
from tree_memory import TreeMemory

from convert.gguf_file import GgufFile
from qguard_edge.conversion.feedback_cost import PARENT_BYTES, Model, cost_of, matrices_of, reference
from qguard_edge.learned.calibration import CalibrationOptions

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD, USED = 1024, 1, 8, 2, 128, 8
INNER, TOTAL = 256, 32_768


@dataclass(frozen=True)
class Mixture:
    """Sizes of a mixture: experts, and the inner width of each."""

    experts: int
    inner: int

    def matrices(self, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape, rows of weights last, in the order of the file."""
        yield "token_embd.weight", (vocabulary, HIDDEN)
        for i in range(LAYERS):
            yield f"blk.{i}.attn_q.weight", (HEADS * HEAD, HIDDEN)
            yield f"blk.{i}.attn_k.weight", (KV_HEADS * HEAD, HIDDEN)
            yield f"blk.{i}.attn_v.weight", (KV_HEADS * HEAD, HIDDEN)
            yield f"blk.{i}.attn_output.weight", (HIDDEN, HEADS * HEAD)
            yield f"blk.{i}.ffn_gate_exps.weight", (self.experts, self.inner, HIDDEN)
            yield f"blk.{i}.ffn_up_exps.weight", (self.experts, self.inner, HIDDEN)
            yield f"blk.{i}.ffn_down_exps.weight", (self.experts, HIDDEN, self.inner)


def write_mixture(path: Path, shape: Mixture, tokenizer: Path) -> Path:
    """Write a model; returns its path."""
    other = GgufFile(tokenizer)
    listed = other.value("tokenizer.ggml.tokens")
    assert isinstance(listed, list)
    generator = np.random.default_rng(0)
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(shape.inner)
    writer.add_expert_feed_forward_length(shape.inner)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(USED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(listed))
    add_vocabulary(writer, other, len(listed))
    matrices = list(shape.matrices(len(listed)))
    vectors = [("output_norm.weight", (HIDDEN,))]
    for i in range(LAYERS):
        vectors += [(f"blk.{i}.{kind}_norm.weight", (HIDDEN,)) for kind in ("attn", "ffn")]
        vectors += [(f"blk.{i}.attn_{kind}_norm.weight", (HEAD,)) for kind in ("q", "k")]
    routers = [(f"blk.{i}.ffn_gate_inp.weight", (shape.experts, HIDDEN)) for i in range(LAYERS)]
    for name, sizes in matrices:
        stored = (*sizes[:-1], 2 * sizes[-1])
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), GGMLQuantizationType.BF16)
    for name, sizes in (*vectors, *routers):
        writer.add_tensor_info(name, sizes, np.dtype(np.float32), 4 * int(np.prod(sizes)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, sizes in matrices:
        writer.write_tensor_data(random_bits(generator, int(np.prod(sizes))))
    for _, sizes in vectors:
        writer.write_tensor_data(np.ones(sizes, np.float32))
    for _, sizes in routers:
        writer.write_tensor_data(generator.standard_normal(sizes, dtype=np.float32))
    writer.close()
    return path


def convert(base: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The command: its stages, what the processor worked, and the largest memory of its processes."""
    command = [sys.executable, "-m", "qguard_edge", "convert", base, "--to", "q4_k", "--threads", args.threads, "--seed", 1]
    command += ["--calib-samples", args.samples, "--no-scan", "--no-fidelity", "--no-load-check", "--json", "-o", out]
    command += ["--max-memory", args.max_memory] if args.max_memory else []
    before = os.times()
    with tempfile.TemporaryFile("w+") as output:
        with (
            subprocess.Popen([str(word) for word in command], stdout=output) as child,
            TreeMemory(child.pid) as memory,
        ):
            code = child.wait()
        if code:
            raise SystemExit(f"convert ended with {code}")
        output.seek(0)
        said = json.load(output)
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    found = {"stages": said["seconds"], "processor": processor, "tokens": said["activations"]["tokens"]}
    return found | {"memory": memory.peaks.anonymous}


def estimate() -> str:
    """What the estimate of `--dry-run` says of a real mixture: 48 layers, hidden 2048, 128 experts of inner width 768, 8 used."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (2048, 151_936)), ("output.weight", (2048, 151_936))]
    for i in range(48):
        shapes += [(f"blk.{i}.attn_{name}.weight", (2048, rows)) for name, rows in (("q", 4096), ("k", 512), ("v", 512))]
        shapes += [(f"blk.{i}.attn_output.weight", (4096, 2048))]
        shapes += [(f"blk.{i}.ffn_{name}_exps.weight", (2048, 768, 128)) for name in ("gate", "up")]
        shapes += [(f"blk.{i}.ffn_down_exps.weight", (768, 2048, 128))]
    text = CalibrationOptions()
    model = Model(matrices_of(shapes), 8, text.seqlen, text.most_tokens)
    cost = cost_of(model, reference(1), limit=None, parent=PARENT_BYTES, quantizer=0)
    return f"Qwen3-30B-A3B, {model.tokens} tokens: {cost.memory_bytes / 2**30:.1f} GiB, {cost.disk_bytes / 2**30:.1f} GiB on disk"


def main() -> None:
    """Measure every shape, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimate", action="store_true")
    parser.add_argument("--tokenizer", type=Path, help="a GGUF whose byte-pair vocabulary is taken")
    parser.add_argument("--experts", default="8,32,128")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-memory")
    args = parser.parse_args()
    if args.estimate:
        print(estimate())
        return
    if args.tokenizer is None:
        parser.error("--tokenizer is missing")
    numbers = [int(number) for number in re.split(r",\s*", args.experts)]
    shapes = [("equal experts", Mixture(n, INNER)) for n in numbers]
    shapes += [("equal total", Mixture(n, TOTAL // n)) for n in numbers if TOTAL // n != INNER]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for kind, shape in shapes:
            base = write_mixture(work / "base.gguf", shape, args.tokenizer)
            found = convert(base, work / "out.gguf", args)
            weights = sum(tensor.n_weights for tensor in GgufFile(base).tensors.values())
            rows.append({"kind": kind, "experts": shape.experts, "inner": shape.inner, "weights": weights} | found)
            for path in (base, work / "out.gguf"):
                path.unlink()
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(f"{rows[0]['tokens']} tokens, {args.threads} threads, --max-memory {args.max_memory or 'not given'}")
    print("| | experts | inner width | M weights | processor, s | memory, MiB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        sizes = f"{row['experts']} | {row['inner']} | {row['weights'] / 1e6:.0f}"
        print(f"| {row['kind']} | {sizes} | {row['processor']:.0f} | {row['memory'] >> 20} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
