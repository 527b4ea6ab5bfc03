"""What a scan gives: findings and the numbers behind them. Importable without torch and llama.cpp."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from qguard_edge.scan.boxes import Fingerprint
from qguard_edge.scan.findings import Finding, Severity, in_order, worst


@dataclass(frozen=True)
class Point:
    """One file of the curve: its target c, its mean KL to full precision, and each document's sum of KL."""

    target: float
    mean_kl: float
    sums: tuple[float, ...]


@dataclass(frozen=True)
class DoseCurve:
    """The curve of one model and type.

    Attributes:
        file_type: what the files are.
        points: plain rounding (target 1) first.
        ratio: lowest mean KL over plain rounding's.
        interval: 95% bootstrap interval of the ratio.
        n_documents: documents measured.
        n_tokens: positions measured.
    """

    file_type: str
    points: tuple[Point, ...]
    ratio: float
    interval: tuple[float, float]
    n_documents: int
    n_tokens: int

    @property
    def lowest(self) -> Point:
        """Where the curve is lowest, plain rounding aside."""
        return min(self.points[1:], key=lambda point: point.mean_kl)


@dataclass(frozen=True)
class Scan:
    """What a scan found.

    Attributes:
        model: its name.
        n_weights: looked at.
        tensors: how many.
        types: that box fingerprints were computed for.
        findings: the most severe first.
        prints: per type, the fingerprint of the whole model.
        outliers: matrices with the largest share of blotted chunks, at most ten: name, share, median ratio.
        seconds: wall time.
        curves: dose curves, with `--deep`.
    """

    model: str
    n_weights: int
    tensors: int
    types: tuple[str, ...]
    findings: tuple[Finding, ...]
    prints: Mapping[str, Fingerprint] = field(default_factory=dict)
    outliers: tuple[tuple[str, float, float], ...] = ()
    seconds: float = 0.0
    curves: tuple[DoseCurve, ...] = ()

    @property
    def worst(self) -> Severity | None:
        """The highest severity, None if nothing was found."""
        return worst(self.findings)

    def with_curves(self, curves: tuple[DoseCurve, ...], findings: list[Finding]) -> "Scan":
        """The scan with dose curves and what they found."""
        return replace(self, curves=curves, findings=in_order([*self.findings, *findings]))
