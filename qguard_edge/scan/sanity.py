"""What a matrix is like before it is tested for attacks: numbers, zeros, precision, and equal magnitudes.

**Effective precision.** A bf16 model saved as f32 has f32's type and bf16's resolution. What counts is which bits are in use:
if the low 16 bits of every f32 weight are zero, the weights are bf16.

**Equal magnitudes.** In a chunk of 32 untouched weights two magnitudes are almost never equal in f32, rarely in f16 and bf16.
In a model that was quantized and written out again they often are: a block has 16 levels, or 255. The *tie share* is the
share of neighbours in sorted order that are equal, zeros left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from convert.gguf_file import TensorInfo
from qguard_edge.scan.findings import Finding, Severity
from qguard_edge.scan.limits import Limits
from quant_grids.ggml_type import GgmlType

TIE_SAMPLE = 1 << 13  # weights per slice
_NAMES: dict[GgmlType, str] = {
    GGMLQuantizationType.F32: "f32",
    GGMLQuantizationType.F16: "f16",
    GGMLQuantizationType.BF16: "bf16",
}


@dataclass(frozen=True)
class SanityStats:
    """Counts of one slice or tensor.

    Attributes:
        weights: looked at.
        broken: not finite.
        zeros: exactly zero.
        ties: equal neighbours in the sorted magnitudes of sampled chunks.
        pairs: neighbours compared.
    """

    weights: int = 0
    broken: int = 0
    zeros: int = 0
    ties: int = 0
    pairs: int = 0

    def __add__(self, other: "SanityStats") -> "SanityStats":
        return SanityStats(
            self.weights + other.weights,
            self.broken + other.broken,
            self.zeros + other.zeros,
            self.ties + other.ties,
            self.pairs + other.pairs,
        )

    @property
    def tie_share(self) -> float:
        """Share of equal neighbours; 0 where nothing was compared."""
        return self.ties / self.pairs if self.pairs else 0.0


def measure(weights: Tensor, *, matrix: bool) -> SanityStats:
    """Counts of some rows, f32 of any shape; ties are looked for in matrices only."""
    broken = 0
    # One sum shows that all is well; only if it is not finite, weights are looked at one by one.
    if not bool(torch.isfinite(weights.sum(dtype=torch.float64))):
        broken = int((~torch.isfinite(weights)).sum())
    ties = pairs = 0
    if matrix and not broken:
        columns = weights.shape[1] // 32 * 32
        chunks = weights[:, :columns].reshape(-1, 32)
        chunks = chunks[:: max(1, chunks.numel() // TIE_SAMPLE)].abs().sort(1).values
        nonzero = chunks[:, :-1] > 0
        ties = int(((chunks[:, 1:] == chunks[:, :-1]) & nonzero).sum())
        pairs = int(nonzero.sum())
    return SanityStats(weights.numel(), broken, weights.numel() - int(torch.count_nonzero(weights)), ties, pairs)


def precision_of(tensor: TensorInfo, weights: Tensor) -> str:
    """`f32`, `f16` or `bf16`: the coarsest type that holds the weights (f32) of a slice exactly."""
    stored = _NAMES[tensor.ggml_type]
    if stored != "f32":
        return stored
    if not bool((weights.contiguous().view(torch.int32) & 0xFFFF).any()):
        return "bf16"
    return "f16" if bool((weights.half().float() == weights).all()) else "f32"


def judge(
    found: Sequence[tuple[TensorInfo, SanityStats, str]],
    vectors: Sequence[tuple[TensorInfo, SanityStats]],
    limits: Limits,
) -> list[Finding]:
    """Findings for a whole model.

    Args:
        found: statistics and precision of every matrix.
        vectors: statistics of every other tensor.
        limits: what clean models show.
    """
    findings = []
    every = [*((tensor, stats) for tensor, stats, _ in found), *vectors]
    broken = [(tensor, stats) for tensor, stats in every if stats.broken]
    if broken:
        count = sum(stats.broken for _, stats in broken)
        text = f"{count} weights are NaN or infinite, the first in {broken[0][0].name!r}"
        names = tuple(tensor.name for tensor, _ in broken)
        findings.append(Finding("QG101", Severity.DANGEROUS, text, tensors=names, numbers={"weights": float(count)}))
    dead = tuple(tensor.name for tensor, stats, _ in found if stats.zeros == stats.weights)
    if dead:
        text = f"{len(dead)} matrices hold nothing but zeros, the first is {dead[0]!r}"
        findings.append(Finding("QG102", Severity.SUSPICIOUS, text, tensors=dead, numbers={"tensors": float(len(dead))}))
    return findings + _precisions(found) + _lattices(found, limits)


def _precisions(found: Sequence[tuple[TensorInfo, SanityStats, str]]) -> list[Finding]:
    """Matrices stored in another precision than most."""
    used: dict[str, list[str]] = {}
    for tensor, stats, precision in found:
        if stats.zeros < stats.weights:
            used.setdefault(precision, []).append(tensor.name)
    if len(used) < 2:
        return []
    most = max(used, key=lambda name: len(used[name]))
    others = tuple(name for precision in sorted(used) if precision != most for name in used[precision])
    listed = ", ".join(f"{len(names)} in {precision}" for precision, names in sorted(used.items()))
    numbers = {precision: float(len(names)) for precision, names in used.items()}
    return [
        Finding("QG103", Severity.INFO, f"matrices have different precisions: {listed}", tensors=others, numbers=numbers)
    ]


def on_a_grid(stats: SanityStats, precision: str, limits: Limits) -> bool:
    """Whether a matrix's weights were quantized before, by its tie share."""
    return stats.pairs > 0 and stats.tie_share > limits.ties[precision]


def _lattices(found: Sequence[tuple[TensorInfo, SanityStats, str]], limits: Limits) -> list[Finding]:
    """Matrices whose weights were quantized before."""
    coarse = [(tensor, stats) for tensor, stats, precision in found if on_a_grid(stats, precision, limits)]
    if not coarse:
        return []
    share = max(stats.tie_share for _, stats in coarse)
    text = (
        f"{len(coarse)} of {len(found)} matrices were quantized before: up to {share:.0%} of the neighbouring magnitudes in a "
        "chunk are equal; box fingerprints cannot be read from them"
    )
    names = tuple(tensor.name for tensor, _ in coarse)
    return [
        Finding("QG106", Severity.INFO, text, tensors=names, numbers={"tie_share": share, "tensors": float(len(coarse))})
    ]
