"""The HTML report: one file that loads nothing else, light and dark, for small and large screens.

The page is `qguard_edge/data/report.html`, a Jinja2 template with autoescape (`scan.html`, which the scan's page is made from,
shares its style sheet): whatever comes from a model or a user's file
is text and stays text. Should that ever fail, the page's content security policy still forbids scripts, images and
every request. Charts are inline SVG with positions in percent (`charts`), so that nothing is scaled and type keeps its
size.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from qguard_edge import __version__
from qguard_edge.report import charts
from qguard_edge.report.text import (
    HEADLINES,
    WORDS,
    candidate_name,
    difference_text,
    first_answers,
    number,
    one_line,
    percent,
    points,
    printable,
)
from qguard_edge.verify.results import Check, Difference, Drift, Evidence, Rate, TensorChange, Verification

MOST_DIFF_WORDS = 1500
_WORDS = re.compile(r"\s+|[^\s]+")


@dataclass(frozen=True)
class Row:
    """One line of a chart: who, where, and the numbers beside it."""

    whisker: charts.Whisker
    text: str
    detail: str


@dataclass(frozen=True)
class CheckView:
    """A check with its charts."""

    check: Check
    rates: tuple[Row, ...]
    rate_ticks: Sequence[charts.Tick]
    differences: tuple[Row, ...]
    difference_ticks: Sequence[charts.Tick]
    margin_from: float
    margin_to: float
    zero: float


@dataclass(frozen=True)
class AnswerView:
    """One side of an answer pair, in pieces: (text, whether the base's answer lacks it)."""

    role: str
    hit: bool | None
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class DriftView:
    """The KL histogram of candidate and plain file."""

    drift: Drift
    histograms: Sequence[charts.Bars]
    ticks: Sequence[charts.Tick]
    limit: float
    means: Sequence[charts.Whisker]


@dataclass(frozen=True)
class TensorView:
    """One tensor's share of codes chosen anew, and its alignment's place on an axis from -1 to 1."""

    change: TensorChange
    share: float
    place: float | None


def to_html(outcome: Verification) -> str:
    """The outcome as one self-contained HTML page."""
    tensors = [_tensor(change) for change in outcome.tensors]
    page: str = page_template("report.html").render(
        outcome=outcome,
        headline=HEADLINES[outcome.verdict],
        candidate=candidate_name(outcome),
        answers=first_answers(outcome),
        checks=[_check(check) for check in outcome.checks if check.suite != "drift"],
        drift_checks=[check for check in outcome.checks if check.suite == "drift"],
        drift=_drift(outcome.drift),
        tensors=tensors,
        most_flips=max((tensor.share for tensor in tensors), default=0.0) or 1.0,
        evidence=[(check, list(_evidence(check))) for check in outcome.checks if check.evidence],
        words=WORDS,
        version=__version__,
    )
    return page


@cache
def page_template(name: str) -> Any:
    """A template of `qguard_edge/data`, with the filters that every page uses."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(lambda file: resources.files("qguard_edge").joinpath("data", file).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "num": number, "clean": printable, "line": one_line}
    environment.filters["bytes"] = _bytes
    return environment.get_template(name)


def _check(check: Check) -> CheckView:
    rates = {"candidate": check.candidate, "base": check.base, "plain": check.plain}
    known: dict[str, Rate] = {role: rate for role, rate in rates.items() if rate is not None}
    axis = charts.rate_axis(list(known.values()))
    rows = tuple(
        Row(axis.whisker(role, rate.value, rate.low, rate.high), percent(rate.value), f"{rate.hits} of {rate.n}")
        for role, rate in known.items()
    )
    gaps = [(role, gap) for role, gap in (("candidate", check.difference), ("plain", check.plain_difference)) if gap]
    if check.difference is None:
        return CheckView(check, rows, charts.percent_ticks(axis), (), (), 0.0, 0.0, 0.0)
    scale = charts.difference_axis(check.difference, check.margin)
    return CheckView(
        check=check,
        rates=rows,
        rate_ticks=charts.percent_ticks(axis),
        differences=tuple(_difference_row(scale, role, gap) for role, gap in gaps),
        difference_ticks=charts.percent_ticks(scale, signed=True),
        margin_from=scale.at(scale.low),
        margin_to=scale.at(check.margin),
        zero=scale.at(0.0),
    )


def _difference_row(axis: charts.Axis, role: str, gap: Difference) -> Row:
    whisker = axis.whisker(role, gap.value, gap.low, gap.high)
    return Row(whisker, points(gap.value), difference_text(gap).partition(" ")[2].strip("()"))


def _drift(drift: Drift | None) -> DriftView | None:
    if drift is None:
        return None
    files = [("candidate", drift.candidate), *([("plain", drift.plain)] if drift.plain else [])]
    scale = drift.candidate.histogram
    means = [
        charts.Whisker(
            role,
            charts.kl_place(scale, numbers.mean_kl),
            charts.kl_place(scale, numbers.mean_kl_low),
            charts.kl_place(scale, numbers.mean_kl_high),
        )
        for role, numbers in files
    ]
    bars = charts.histogram_bars([(role, numbers.histogram) for role, numbers in files])
    return DriftView(drift, bars, charts.decade_ticks(scale), charts.kl_place(scale, drift.limit), means)


def _tensor(change: TensorChange) -> TensorView:
    share = change.flips / change.weights if change.weights else 0.0
    place = None if change.alignment is None else charts.Axis(-0.2, 1.0).at(change.alignment)
    return TensorView(change, share, place)


def _evidence(check: Check) -> Iterator[tuple[Evidence, list[AnswerView]]]:
    for shown in check.evidence:
        base = printable(shown.base)
        answers = [
            AnswerView("candidate", shown.candidate_hit, marked(printable(shown.candidate), base)),
            AnswerView("base", shown.base_hit, ((base, False),)),
        ]
        if shown.plain is not None:
            answers.append(AnswerView("plain", shown.plain_hit, marked(printable(shown.plain), base)))
        yield shown, answers


def marked(text: str, base: str) -> tuple[tuple[str, bool], ...]:
    """The text in pieces, each with whether the base's answer lacks it there."""
    words, others = _WORDS.findall(text), _WORDS.findall(base)
    if max(len(words), len(others)) > MOST_DIFF_WORDS:
        return ((text, False),)
    matcher = difflib.SequenceMatcher(None, others, words, autojunk=False)
    pieces = [("".join(words[j:k]), kind != "equal") for kind, _, _, j, k in matcher.get_opcodes() if k > j]
    return tuple((piece, new and not piece.isspace()) for piece, new in pieces)


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
