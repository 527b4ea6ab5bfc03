"""Positions for the charts of the HTML report, in percent of the width, so that they fit a phone as they fit a desk.

Only arithmetic: what is drawn at these places stands in the template.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qguard_edge.verify.results import Difference, Histogram, Rate

_NICE = (1, 2, 5)


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place, 0..100, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Whisker:
    """A dot with its interval.

    Attributes:
        role: candidate, base or plain.
        at: of the dot, 0..100.
        low: of the interval's lower end.
        high: of its upper end.
        beyond: the dot lies outside the axis, at its edge.
    """

    role: str
    at: float
    low: float
    high: float
    beyond: bool = False


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high`."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Place of a value, 0..100; what lies outside is put at the edge."""
        return round(min(max(100 * (value - self.low) / (self.high - self.low), 0.0), 100.0), 2)

    def covers(self, value: float) -> bool:
        """Whether the value lies on the axis."""
        return self.low <= value <= self.high

    def whisker(self, role: str, value: float, low: float, high: float) -> Whisker:
        """A dot with its interval on this axis."""
        return Whisker(role, self.at(value), self.at(low), self.at(high), beyond=not self.covers(value))


def nice_ceiling(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... times a power of ten."""
    if value <= 0:
        return 0.01
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in _NICE if step * power >= value * (1 - 1e-9)), 10 * power)


def rate_axis(rates: Sequence[Rate]) -> Axis:
    """From 0 to a round number above all intervals, at most 100%."""
    return Axis(0.0, min(1.0, nice_ceiling(max((rate.high for rate in rates), default=1.0))))


def difference_axis(candidate: Difference, margin: float) -> Axis:
    """Symmetric around 0, so that the margin and the candidate's interval are on it."""
    reach = min(1.0, nice_ceiling(max(abs(candidate.low), abs(candidate.high), 1.5 * margin)))
    return Axis(-reach, reach)


def percent_ticks(axis: Axis, *, signed: bool = False) -> list[Tick]:
    """Five ticks in percent, or in signed points."""
    values = [axis.low + (axis.high - axis.low) * i / 4 for i in range(5)]
    return [Tick(axis.at(value), _percent_label(value, signed)) for value in values]


def _percent_label(value: float, signed: bool) -> str:
    if signed:
        return f"{100 * value:+.3g}" if value else "0"
    return f"{100 * value:.3g}%"


@dataclass(frozen=True)
class Bar:
    """One bin: left edge, width and height in percent, and what stands in its tooltip."""

    left: float
    width: float
    height: float
    tip: str


@dataclass(frozen=True)
class Bars:
    """A histogram of one file, drawn to a scale that all files share."""

    role: str
    bars: tuple[Bar, ...]


def histogram_bars(histograms: Sequence[tuple[str, Histogram]]) -> list[Bars]:
    """Bars of several histograms over the same edges; the highest bin of all is 100% high."""
    top = max((_share(h, i) for _, h in histograms for i in range(len(h.counts))), default=0.0) or 1.0
    return [
        Bars(
            role,
            tuple(
                Bar(
                    left=_place(histogram, i),
                    width=_place(histogram, i + 1) - _place(histogram, i),
                    height=round(100 * _share(histogram, i) / top, 2),
                    tip=f"{role}: {count} tokens with KL {10 ** histogram.edges[i]:.2g} to {10 ** histogram.edges[i + 1]:.2g}",
                )
                for i, count in enumerate(histogram.counts)
                if count
            ),
        )
        for role, histogram in histograms
    ]


def decade_ticks(histogram: Histogram) -> list[Tick]:
    """A tick at every second power of ten."""
    first, last = math.ceil(histogram.edges[0]), math.floor(histogram.edges[-1])
    return [Tick(_at(histogram, power), f"1e{power}") for power in range(first, last + 1) if power % 2 == 0]


def kl_place(histogram: Histogram, kl: float) -> float:
    """Place of a KL value on the histogram's axis, 0..100."""
    return _at(histogram, math.log10(max(kl, 1e-30)))


def _at(histogram: Histogram, logarithm: float) -> float:
    return Axis(histogram.edges[0], histogram.edges[-1]).at(logarithm)


def _place(histogram: Histogram, edge: int) -> float:
    return _at(histogram, histogram.edges[edge])


def _share(histogram: Histogram, i: int) -> float:
    return histogram.counts[i] / max(sum(histogram.counts), 1)
