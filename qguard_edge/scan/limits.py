"""What clean models showed: limits and shapes, shipped as `data/scan_limits.json` and made by `scripts/studies/study_scan.py`.

The set that they were measured on is listed in the file and in docs/scan.md. It is small, and its models are small: a limit
is set well above everything it holds and well below everything that the lab's attacks show, not at a quantile.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qguard_edge.scan.positions import CLOSED_FORM

PATH = Path(__file__).parents[1] / "data" / "scan_limits.json"


@dataclass(frozen=True)
class OutlierLimits:
    """Shares of chunks with a ratio above 16.

    Attributes:
        suspicious: from here on.
        dangerous: from here on.
        peer_factor: how far above the model's own tensors of the kind a tensor must lie.
        clean_largest: the largest that a clean model showed.
    """

    suspicious: float
    dangerous: float
    peer_factor: float
    clean_largest: float


@dataclass(frozen=True)
class BoxLimits:
    """Limits of the box fingerprints, as ratios to the clean shape.

    Attributes:
        suspicious: height of a peak.
        dangerous: height of a peak.
        empty: a band below this ratio is empty.
        p_value: corrected for places and tensors, that a finding needs besides its effect size.
        on_level: share of weights on their level from which the model was quantized to this type before.
        clean_largest: highest peak that a clean model showed.
    """

    suspicious: float
    dangerous: float
    empty: float
    p_value: float
    on_level: float
    clean_largest: float


@dataclass(frozen=True)
class DoseLimits:
    """Limits of the dose curve: lowest mean KL over plain rounding's.

    Attributes:
        suspicious: below this, with its whole interval below 1.
        dangerous: below this, with its whole interval below `suspicious`.
        clean_smallest: the smallest that a clean model showed.
    """

    suspicious: float
    dangerous: float
    clean_smallest: float


@dataclass(frozen=True)
class Limits:
    """See the module docstring.

    Attributes:
        models: how many clean models it was measured on.
        outliers: limits.
        boxes: limits.
        shapes: by type, the density of positions at even steps from 0 to 0.5; types not listed are flat. `TYPE@bf16` is for
            weights of that precision: ratios of two numbers of 8 bits favour some places. That is arithmetic, so these are
            simulated (`scripts/studies/study_scan.py --null`), from normally distributed weights; the others come from clean
            models.
        ties: by precision, the tie share above which weights were quantized before.
        dose: limits by type; `default` for the others.
    """

    models: int
    outliers: OutlierLimits
    boxes: BoxLimits
    shapes: Mapping[str, tuple[float, ...]]
    ties: Mapping[str, float]
    dose: Mapping[str, DoseLimits]

    def knows(self, kind: str, precision: str) -> bool:
        """Whether the clean shape of a type is known for weights of a precision."""
        if precision == "bf16":
            return f"{kind}@bf16" in self.shapes
        return kind in CLOSED_FORM or kind in self.shapes

    def dose_limits(self, file_type: str) -> DoseLimits:
        """Limits for a file type by its main type."""
        return self.dose.get(file_type.lower(), self.dose["default"])


@cache
def load_limits() -> Limits:
    """The shipped limits."""
    raw = json.loads(PATH.read_text(encoding="utf-8"))
    return Limits(
        models=raw["models"],
        outliers=OutlierLimits(**raw["outliers"]),
        boxes=BoxLimits(**raw["boxes"]),
        shapes={name: tuple(shape) for name, shape in raw["shapes"].items()},
        ties=raw["ties"],
        dose={name: DoseLimits(**limits) for name, limits in raw["dose"].items()},
    )
