"""Outlier injection: one weight of a chunk so large that the others round to zero (arXiv 2605.15152).

A chunk is 32 weights of a row, what every scalar GGUF type scales together. Its *ratio* is that of its largest magnitude to
its median magnitude. With a ratio above 16 at least half of the chunk lies below a sixteenth of the largest, which is half
a step of a 4-bit type: these weights round to zero, whatever they are. Above 254 the same holds for 8 bits.

The statistic is the **share of chunks with a ratio above 16**. It needs no sorting: the ratio of a chunk exceeds 16 exactly
when half of its weights are smaller than a sixteenth of the largest, and counting is fast. For chunks of a normal
distribution the ratio is 3 to 4; one above 16 has a probability below 1e-20. Trained models have some, in few places.

A tensor is flagged when its share is far above what clean models show (`limits`) and above the model's own tensors
of the same kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from convert.gguf_file import TensorInfo
from qguard_edge.scan.findings import Finding, Severity
from qguard_edge.scan.limits import Limits
from qguard_edge.scan.tensors import kind_of

CHUNK = 32
RATIO = 16.0
RATIO_8_BITS = 254.0
MEDIAN_SAMPLE = 1 << 13  # weights per slice whose exact median ratio is taken, for the report


@dataclass(frozen=True)
class OutlierStats:
    """Counts of one slice or tensor.

    Attributes:
        chunks: looked at; all-zero ones left out.
        blotted: of these, with a ratio above 16.
        blotted_8: with a ratio above 254.
        lost: weights that a 4-bit type with one scale per chunk rounds to zero.
        lost_8: the same for 8 bits.
        ratio_sum: sum over slices of the sampled median ratio, times the slice's chunks.
    """

    chunks: int = 0
    blotted: int = 0
    blotted_8: int = 0
    lost: int = 0
    lost_8: int = 0
    ratio_sum: float = 0.0

    def __add__(self, other: "OutlierStats") -> "OutlierStats":
        return OutlierStats(
            self.chunks + other.chunks,
            self.blotted + other.blotted,
            self.blotted_8 + other.blotted_8,
            self.lost + other.lost,
            self.lost_8 + other.lost_8,
            self.ratio_sum + other.ratio_sum,
        )

    @property
    def share(self) -> float:
        """Share of chunks with a ratio above 16."""
        return self.blotted / self.chunks if self.chunks else 0.0

    @property
    def lost_share(self) -> float:
        """Share of the weights that round to zero at 4 bits."""
        return self.lost / (self.chunks * CHUNK) if self.chunks else 0.0

    @property
    def median_ratio(self) -> float:
        """Typical ratio of largest to median magnitude of a chunk."""
        return self.ratio_sum / self.chunks if self.chunks else 0.0


def measure(weights: Tensor) -> OutlierStats:
    """Counts of some rows: f32 `[rows, columns]`; columns beyond a multiple of 32 are left out."""
    columns = weights.shape[1] // CHUNK * CHUNK
    sizes = weights[:, :columns].abs().reshape(-1, CHUNK)
    largest = sizes.amax(1, keepdim=True)
    below = (sizes < largest / RATIO).sum(1)
    below_8 = (sizes < largest / RATIO_8_BITS).sum(1)
    live = int((largest > 0).sum())
    # The lower median of 32 is the 16th: below a bound exactly when 16 weights are.
    sample = sizes[:: max(1, sizes.numel() // MEDIAN_SAMPLE)]
    ratios = sample.amax(1) / sample.median(1).values.clamp_min(1e-30)
    ratio = float(ratios.clamp_(max=1e6).median()) if len(ratios) else 0.0
    return OutlierStats(
        chunks=live,
        blotted=int((below >= CHUNK // 2).sum()),
        blotted_8=int((below_8 >= CHUNK // 2).sum()),
        lost=int(below.sum()),
        lost_8=int(below_8.sum()),
        ratio_sum=ratio * live,
    )


def judge(found: Sequence[tuple[TensorInfo, OutlierStats]], limits: Limits) -> list[Finding]:
    """Findings for a whole model.

    Args:
        found: the statistics of every matrix.
        limits: what clean models show.
    """
    known = limits.outliers
    findings: list[Finding] = []
    for severity, limit in ((Severity.DANGEROUS, known.dangerous), (Severity.SUSPICIOUS, known.suspicious)):
        flagged = []
        for tensor, stats in found:
            peers = [other.share for info, other in found if kind_of(info.name) == kind_of(tensor.name) and info != tensor]
            usual = median(peers) if peers else 0.0
            # The model's own usual share only raises the limit up to a point: all its tensors may have been tampered with.
            wanted = max(limit, min(known.peer_factor * usual, known.dangerous))
            if stats.share >= wanted and not any(tensor.name in finding.tensors for finding in findings):
                flagged.append((tensor, stats))
        if flagged:
            findings.append(_finding(severity, sorted(flagged, key=lambda item: -item[1].share), known.clean_largest))
    return findings


def _finding(severity: Severity, flagged: list[tuple[TensorInfo, OutlierStats]], clean: float) -> Finding:
    first, stats = flagged[0]
    count = f"{len(flagged)} tensors, most in" if len(flagged) > 1 else "in"
    return Finding(
        code="QG201",
        severity=severity,
        message=(
            f"{count} {first.name!r}: in {stats.share:.1%} of its chunks of 32 the largest weight is more than {RATIO:.0f} times "
            f"the median (clean models: at most {clean:.2%}); 4 bits round {stats.lost_share:.0%} of its weights to zero"
        ),
        tensors=tuple(tensor.name for tensor, _ in flagged),
        numbers={
            "share_of_chunks": stats.share,
            "share_of_chunks_8_bits": stats.blotted_8 / max(stats.chunks, 1),
            "median_ratio": stats.median_ratio,
            "rounded_to_zero": stats.lost_share,
            "clean_largest_share": clean,
        },
    )
