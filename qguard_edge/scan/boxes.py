"""Box fingerprints: the marks that a repair leaves when it pushes weights against walls they may not cross.

An attacked model is repaired by training that projects each weight back into an interval around the code it must keep (arXiv
2405.18137, 2505.23786). Weights that training pushes outwards end up exactly at the interval's end, and all intervals end at
the same place of the cell: 0.4 step for ELQ on INT8, 1% from the wall for NF4 and FP4, 0.499 step for whole cells of the
legacy types, a tenth of a cell beyond the level for stretched error boxes. So the histogram of positions (`positions`), flat
for untouched weights, gets a peak, and what lies beyond it is thinned out or empty.

The place is not assumed: an attacker chooses it. The statistic is a scan over all 100 places,

    peak = max over places of  (observed / clean shape) / its median over all places

an effect size: 1 is clean, 2 means twice as many weights as elsewhere. With millions of weights a p-value alone means little
(a deviation of 2% is significant and means nothing), so a finding needs both: the peak above its limit, and a p-value
(normal approximation of the count, Bonferroni over places, Holm over tensors) below `p_value`.

The first two places, within 0.01 of the level, are judged apart: weights on their levels are also the mark of quantization
before. A finding is dangerous only if several tensors peak at the same place, or the whole model does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qguard_edge.scan.findings import Finding, Severity
from qguard_edge.scan.limits import BoxLimits, Limits
from qguard_edge.scan.positions import BINS

FEWEST = 5000  # weights that count, for a histogram to be judged
ON_LEVEL = 2  # places that mean "on the level"
BAND = 4  # places of an empty band
SAME_PLACE = 0.02
SEVERAL = 2

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Fingerprint:
    """The positions of one tensor, or of the whole model, for one type.

    Attributes:
        name: of the tensor.
        density: per place, 1 on average.
        n: weights that count.
        peak: height of the highest peak off the level, against the clean shape.
        place: where, in cells from the level.
        p_value: of the peak, corrected for places.
        level: height at the level.
        on_level: share of the weights within 0.005 of the level.
        band: lowest density of a band of `BAND` places, against the clean shape.
        band_at: where it begins.
    """

    name: str
    density: tuple[float, ...]
    n: int
    peak: float
    place: float
    p_value: float
    level: float
    on_level: float
    band: float
    band_at: float


def shape_of(file_type: str, limits: Limits, precision: str = "f32") -> FloatArray:
    """The clean density of a type over all places, mean 1, for weights of a precision."""
    kind = file_type.lower()
    knots = limits.shapes.get(f"{kind}@{precision}", limits.shapes.get(kind, (1.0,)))
    places = (np.arange(BINS) + 0.5) / BINS
    shape = np.interp(places, (np.arange(len(knots)) + 0.5) / len(knots), knots)
    return np.asarray(shape / shape.mean(), dtype=np.float64)


def fingerprint(name: str, counts: npt.NDArray[np.int64], shape: FloatArray) -> Fingerprint | None:
    """Judge one histogram; None if too few weights count.

    Args:
        name: of the tensor.
        counts: int64 `[BINS]`.
        shape: clean density of the type, mean 1.
    """
    n = int(counts.sum())
    if n < FEWEST:
        return None
    density = counts * (BINS / n)
    against = density / shape
    usual = max(float(np.median(against)), 0.05)
    heights = against / usual
    off = heights[ON_LEVEL:]
    best = int(off.argmax()) + ON_LEVEL
    expected = max(n / BINS * float(shape[best]) * usual, 1.0)
    z = (float(counts[best]) - expected) / math.sqrt(expected)
    bands = np.convolve(heights, np.ones(BAND) / BAND, "valid")
    lowest = int(bands.argmin())
    return Fingerprint(
        name=name,
        density=tuple(float(value) for value in density),
        n=n,
        peak=float(heights[best]),
        place=(best + 0.5) / (2 * BINS),
        p_value=min(1.0, 0.5 * math.erfc(z / math.sqrt(2.0)) * BINS),
        level=float(heights[:ON_LEVEL].mean()),
        on_level=float(counts[0]) / n,
        band=float(bands[lowest]),
        band_at=lowest / (2 * BINS),
    )


def pooled(name: str, prints: Sequence[Fingerprint], shape: FloatArray) -> Fingerprint:
    """The whole model's: the mean of the tensors' densities, each with the same weight."""
    density = np.mean([found.density for found in prints], axis=0)
    total = sum(found.n for found in prints)
    made = fingerprint(name, np.rint(density * (total / BINS)).astype(np.int64), shape)
    assert made is not None  # each of them has enough weights
    return made


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = running
    return corrected


def judge(file_type: str, prints: Sequence[Fingerprint], whole: Fingerprint, limits: Limits) -> list[Finding]:
    """Findings for one type.

    Args:
        file_type: the type.
        prints: of every tensor that could be judged; at least one.
        whole: of the model.
        limits: what clean models show.
    """
    return [
        *_peaks(file_type, prints, whole, limits.boxes),
        *_empty_bands(file_type, prints, whole, limits.boxes),
        *_levels(file_type, prints, whole, limits.boxes),
    ]


def _peaks(file_type: str, prints: Sequence[Fingerprint], whole: Fingerprint, limits: BoxLimits) -> list[Finding]:
    corrected = holm([found.p_value for found in prints])
    high = [
        found
        for found, p in zip(prints, corrected, strict=True)
        if found.peak >= limits.suspicious and p < limits.p_value and not _quantized_before(found, limits)
    ]
    if not high or _quantized_before(whole, limits):
        return []
    high.sort(key=lambda found: -found.peak)
    alike = max(([f for f in high if abs(f.place - one.place) <= SAME_PLACE] for one in high[:50]), key=len)
    strong = [found for found in alike if found.peak >= limits.dangerous]
    dangerous = len(strong) >= SEVERAL or (whole.peak >= limits.dangerous and len(prints) < SEVERAL)
    shown = (strong if dangerous else high)[0]
    return [
        Finding(
            "QG301",
            Severity.DANGEROUS if dangerous else Severity.SUSPICIOUS,
            f"{file_type.upper()}: in {len(high)} of {len(prints)} matrices weights are piled up at one place of their cells, "
            f"{shown.peak:.1f} times as many as expected {shown.place:.3f} cells from the level in {shown.name!r} (whole model: "
            f"{whole.peak:.1f} times; clean models: at most {limits.clean_largest:.2f})",
            file_type,
            tuple(found.name for found in high),
            {"peak": shown.peak, "place": shown.place, "model_peak": whole.peak, "model_place": whole.place,
             "tensors": float(len(high)), "same_place": float(len(alike)), "weights": float(shown.n)},
        )
    ]  # fmt: skip


def _empty_bands(file_type: str, prints: Sequence[Fingerprint], whole: Fingerprint, limits: BoxLimits) -> list[Finding]:
    empty = [found for found in prints if found.band < limits.empty and not _quantized_before(found, limits)]
    if not empty or _quantized_before(whole, limits):
        return []
    empty.sort(key=lambda found: found.band)
    dangerous = len(empty) >= SEVERAL and whole.band < limits.empty
    shown = empty[0]
    return [
        Finding(
            "QG302",
            Severity.DANGEROUS if dangerous else Severity.SUSPICIOUS,
            f"{file_type.upper()}: in {len(empty)} of {len(prints)} matrices hardly any weight lies {shown.band_at:.3f} cells "
            f"from its level ({shown.band:.0%} of what is expected in {shown.name!r}, {whole.band:.0%} in the whole model)",
            file_type,
            tuple(found.name for found in empty),
            {"band": shown.band, "band_at": shown.band_at, "model_band": whole.band, "tensors": float(len(empty))},
        )
    ]


def _levels(file_type: str, prints: Sequence[Fingerprint], whole: Fingerprint, limits: BoxLimits) -> list[Finding]:
    if _quantized_before(whole, limits):
        text = (
            f"{file_type.upper()}: {whole.on_level:.0%} of the weights lie on a level: the model was quantized to this type"
        )
        return [Finding("QG106", Severity.INFO, text, file_type, (), {"on_level": whole.on_level})]
    high = sorted((f for f in prints if f.level >= limits.suspicious), key=lambda f: -f.level)
    if not high:
        return []
    text = (
        f"{file_type.upper()}: in {len(high)} of {len(prints)} matrices more weights than expected lie on a level, "
        f"{high[0].level:.1f} times as many in {high[0].name!r} (whole model: {whole.level:.1f} times)"
    )
    numbers: Mapping[str, float] = {"level": high[0].level, "model_level": whole.level, "tensors": float(len(high))}
    return [Finding("QG303", Severity.SUSPICIOUS, text, file_type, tuple(f.name for f in high), numbers)]


def _quantized_before(found: Fingerprint, limits: BoxLimits) -> bool:
    return found.on_level >= limits.on_level
