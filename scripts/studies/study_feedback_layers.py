"""What options of error feedback do to the output error of single matrices, on inputs that the Gram matrices did not see.

Run: python scripts/studies/study_feedback_layers.py BASE.gguf --texts INSTRUCTIONS.jsonl --work FOLDER --to q4_k

Files, texts and FOLDER as for scripts/studies/study_feedback.py. Five matrices in each of four layers, 256
rows each; Gram matrices of
8,192 tokens to round with and of 4,096 others to judge by. Per variant: `e H e^T` over plain rounding's (mean over matrices), on
the inputs to judge by and on those that were seen; bits per weight; alignment; squared error over plain rounding's. Among the
variants are sweeps of coordinate descent after the pass (each code again to its best level, all others fixed), and of drawing
each code again (whose draws alone are counted, for they are what is left to guess by somebody who knows the pass).
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from study_feedback import documents_of
from torch import Tensor

from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile, GgufModel
from convert.quantizer import QuantizeOptions, quantize
from convert.tensor_io import RowSlice, open_reader
from qguard_edge.defenses.base import SliceKey
from qguard_edge.defenses.feedback import Feedback, FittedPass, Tuning
from qguard_edge.defenses.options import FeedbackOptions
from qguard_edge.runtimes.activations import LlamaGramSource
from qguard_edge.runtimes.grams import wanted_weights
from quant_grids import grid_for
from quant_grids.base import ScalarGrid

PARTS, ROWS, SEEN, JUDGED = ("attn_q", "attn_v", "attn_output", "ffn_up", "ffn_down"), 256, 8192, 4096
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sample:
    """Some rows of a matrix: plain blocks, weights, the Gram matrix to round with and the one to judge by."""

    name: str
    grid: ScalarGrid
    blocks: Tensor
    weights: Tensor
    seen: Tensor
    judged: Tensor


Sweep = Callable[[Sample, FittedPass, Tensor, float], tuple[Tensor, float]]
"""From (sample, pass, blocks, bits) to new blocks and bits."""


def sweep(damping: float, width: float = 0.0) -> Sweep:
    """One sweep over all codes: to the nearest (coordinate descent), or drawn anew."""

    def run(sample: Sample, rule: FittedPass, blocks: Tensor, bits: float) -> tuple[Tensor, float]:
        grid, weights = sample.grid, sample.weights
        parts = grid.unpack(blocks)
        codes = parts.codes.view(weights.shape).float()
        scale = parts.scale.view(len(weights), -1).repeat_interleave(grid.sub_size, 1)
        plain, error = (grid.dequantize(b).view(weights.shape) - weights for b in (sample.blocks, blocks))
        gram = sample.seen.clone()
        gram.diagonal().add_(damping * gram.diagonal().mean())
        product, generator, drawn = error @ gram, torch.Generator().manual_seed(5), 0.0
        for j in rule.factor.order.tolist():
            usable, size = scale[:, j] != 0, gram[j, j]
            best = -(product[:, j] - size * error[:, j] + rule.lean * plain[:, j]) / size
            place = codes[:, j] + (best - error[:, j]) / torch.where(usable, scale[:, j], 1.0)
            chosen = place.round()
            if width:
                chosen = (place + width * (torch.rand(len(weights), generator=generator) - 0.5)).round()
                upper = (0.5 + (place - place.floor() - 0.5) / width).clamp(0.0, 1.0)
                drawn += float((torch.special.entr(upper) + torch.special.entr(1.0 - upper)).sum()) / math.log(2)
            chosen = torch.where(usable, chosen.clamp(0, len(grid.levels) - 1), codes[:, j])
            move = (chosen - codes[:, j]) * scale[:, j]
            codes[:, j] = chosen
            error[:, j] += move
            product.addr_(move, gram[j])
        return grid.pack(blocks, codes.to(torch.uint8).view(parts.codes.shape)), drawn if width else bits

    return run


def samples_of(base: GgufModel, plain: GgufFile, lines: list[str], work: Path) -> list[Sample]:
    """The matrices to look at."""
    layers = 1 + max(int(name.split(".")[1]) for name in base.tensors if name.startswith("blk."))
    names = [f"blk.{layers * (2 * i + 1) // 8}.{part}.weight" for i in range(4) for part in PARTS]
    half = len(lines) // 2
    seen, _, _ = documents_of(base.path, lines[:half], SEEN)
    others, _, _ = documents_of(base.path, lines[half:], JUDGED)
    source, wanted = LlamaGramSource(base), wanted_weights(base, names)
    grams = source.collect(wanted, seen, work / "layers-seen", threads=1)
    judged = source.collect(wanted, others, work / "layers-judged", threads=1)
    found = []
    with open_reader(plain.path, *(shard.path for shard in base.shards)) as reader:
        for name in names:
            tensor = plain.tensors[name]
            rows, grid = RowSlice(0, 0, min(ROWS, tensor.rows)), grid_for(tensor.ggml_type)
            assert isinstance(grid, ScalarGrid)
            blocks, weights = reader.blocks(tensor, rows), reader.weights(base.tensors[name], rows)
            found.append(Sample(name, grid, blocks, weights, grams.of(name, 0), judged.of(name, 0)))
    return found


def measure(samples: list[Sample], options: FeedbackOptions, tuning: Tuning, after: Sweep | None) -> list[float]:
    """Means over the samples, in the order of the table's columns."""
    rows = []
    for sample in samples:
        defense = Feedback(options)
        defense.tuning = tuning
        grid, weights = sample.grid, sample.weights
        factor = defense.factor(grid, sample.seen, weights.shape[1], CPU)
        rule = defense.fit(grid, factor, sample.blocks, weights, SliceKey(7, sample.name, 0))
        assert isinstance(rule, FittedPass)
        made = rule.round(sample.blocks, weights, SliceKey(8, sample.name, 0))
        blocks, bits = (made.blocks, made.bits) if after is None else after(sample, rule, made.blocks, made.bits)
        plain, ours = (grid.dequantize(b).view(weights.shape) - weights for b in (sample.blocks, blocks))
        judged, seen = (
            float(((ours @ gram) * ours).sum() / ((plain @ gram) * plain).sum()) for gram in (sample.judged, sample.seen)
        )
        energy = float(plain.square().sum())
        alignment = float((ours * plain).sum()) / energy
        rows.append((judged, seen, bits / weights.numel(), alignment, float(ours.square().sum()) / energy))
    return [float(value) for value in np.array(rows).mean(0)]


def variants() -> Iterator[tuple[str, FeedbackOptions, Tuning, Sweep | None]]:
    """What is tried, one change at a time from the defaults of `FeedbackOptions` and `Tuning`."""
    usual, tuning = FeedbackOptions(), Tuning()
    yield "defaults", usual, tuning, None
    for order in ("natural", "random"):
        yield f"order {order}", usual, Tuning(order=order), None
    for reach in (0, 2, 255):
        yield f"reach {reach}", usual, Tuning(reach=reach), None
    yield "order natural, reach 0", usual, Tuning(order="natural", reach=0), None
    for damping in (0.003, 0.01, 0.1, 0.3):
        yield f"damping {damping}", usual, Tuning(damping=damping), None
    for width in (0.0, 0.25, 0.75, 1.0):
        yield f"width {width}", FeedbackOptions(width=width), tuning, None
    for alignment in (1.0, 0.1, -0.15, -0.3):
        yield f"c = {alignment}", FeedbackOptions(alignment=alignment), tuning, None
    still = FeedbackOptions(width=0.0)
    yield "width 0, coordinate descent", still, tuning, sweep(tuning.damping)
    yield "coordinate descent", usual, tuning, sweep(tuning.damping)
    for width in (0.5, 1.0):
        yield f"drawn anew at width {width}", usual, tuning, sweep(tuning.damping, width)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--to", default="q4_k")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    base, plain = GgufModel(args.base), args.work / f"plain-{args.to}.gguf"
    if not plain.exists():
        quantize(base.path, plain, QuantizeOptions(parse_file_type(args.to), threads=1))
    samples = samples_of(base, GgufFile(plain), args.texts.read_text(encoding="utf-8").splitlines(), args.work)
    print("| variant | output error | on what was seen | bits/weight | alignment | squared error |")
    print("|---|---|---|---|---|---|")
    with torch.inference_mode():
        for name, options, tuning, after in variants():
            judged, seen, bits, alignment, energy = measure(samples, options, tuning, after)
            print(f"| {name} | {judged:.4f} | {seen:.4f} | {bits:.3f} | {alignment:+.3f} | {energy:.2f} |", flush=True)


if __name__ == "__main__":
    main()
