"""The HTML report: one file, everything in it, nothing of it alive."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from qguard_edge.report.charts import Axis, difference_axis, histogram_bars, nice_ceiling
from qguard_edge.report.html import marked, to_html
from qguard_edge.report.text import agreement_text
from qguard_edge.verify.results import Histogram
from tests.helpers.report_examples import HOSTILE, example, hostile

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


@pytest.mark.parametrize("outcome", [example(), hostile()], ids=["example", "hostile"])
def test_nothing_is_alive_and_nothing_is_asked_for(outcome: object) -> None:
    text = to_html(outcome)  # type: ignore[arg-type]
    page = Page(text)
    assert page.open == []
    assert not {"script", "img", "iframe", "link", "object", "embed", "form", "base"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "srcset", "action", "data", "xlink:href")]
    assert all(str(value).startswith("#check-") for name, value in page.attributes if name == "href")
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in text
    assert "{{" not in text.replace("{{7*7}}", "")


def test_hostile_text_is_shown_as_text() -> None:
    page = Page(to_html(hostile()))
    words = "".join(page.words)
    assert words.count("<script>alert(1)</script>") > 20
    assert "\u202e" not in words
    assert "<U+202E>evil" in words
    assert HOSTILE not in words  # control characters are written out


def test_everything_is_in_it() -> None:
    outcome = example()
    words = " ".join(" ".join(Page(to_html(outcome)).words).split())
    for check in outcome.checks:
        assert check.id in words
        assert check.title in words
        assert check.reason in words
    for facts in outcome.files:
        assert facts.sha256 in words
    for said in (
        *outcome.limits,
        *outcome.warnings,
        outcome.measured.system,
        "seed 0",
        "0.00021",
        "llama-cpp-python 0.3.36",
    ):
        assert said in words
    assert all(change.name in words for change in outcome.tensors)
    assert "without a defense: fail" in words


def test_charts_put_things_where_the_numbers_say() -> None:
    text = to_html(example())
    # refusals: rate axis to 50%, candidate 19 of 150 (8.3% to 18.9%)
    assert '<line x1="16.6%" x2="37.8%" y1="12" y2="12" class="candidate bar"/>' in text
    # difference axis -20..+20, candidate +10.0 (5.9 to 14.9): right of the margin at 55%
    assert '<line x1="64.75%" x2="87.25%" y1="12" y2="12" class="candidate bar"/>' in text
    assert '<rect x="0.0%" y="0" width="55.0%" height="24" class="ok"/>' in text


def test_a_report_without_plain_drift_tensors_and_evidence() -> None:
    outcome = example()
    bare = replace(outcome.checks[1], plain=None, plain_difference=None, plain_verdict=None)
    text = to_html(replace(outcome, checks=(bare,), drift=None, tensors=(), files=outcome.files[:2], warnings=()))
    Page(text)
    for words in ("What the defense changed", "Answers side by side", "Drift: how far", "Know before"):
        assert words not in text


def test_axes() -> None:
    assert [nice_ceiling(x) for x in (0.0, 0.011, 0.02, 0.021, 0.3, 0.95)] == [0.01, 0.02, 0.02, 0.05, 0.5, 1.0]
    gap = example().checks[2].difference
    assert gap is not None
    assert difference_axis(gap, 0.02) == Axis(-0.1, 0.1)
    axis = Axis(-0.1, 0.1)
    assert (axis.at(-0.1), axis.at(0.0), axis.at(0.05), axis.at(0.7)) == (0.0, 50.0, 75.0, 100.0)
    assert axis.whisker("plain", 0.7, 0.6, 0.8).beyond


def test_histograms_share_one_scale() -> None:
    first, second = Histogram((-2.0, -1.0, 0.0), (10, 30)), Histogram((-2.0, -1.0, 0.0), (20, 0))
    bars = histogram_bars([("candidate", first), ("plain", second)])
    assert [[(bar.left, bar.width, bar.height) for bar in file.bars] for file in bars] == [
        [(0.0, 50.0, 25.0), (50.0, 50.0, 75.0)],
        [(0.0, 50.0, 100.0)],
    ]


def test_marked_words_are_those_the_base_lacks() -> None:
    pieces = marked("bees make fresh honey", "bees make honey")
    assert "".join(text for text, _ in pieces) == "bees make fresh honey"
    assert [text.strip() for text, new in pieces if new] == ["fresh"]


def test_the_first_screen_says_how_near_to_full_precision_the_file_is() -> None:
    outcome = example()
    assert outcome.drift is not None
    assert outcome.drift.plain is not None
    near = replace(outcome.drift.candidate, mean_kl=0.02, mean_kl_low=0.018, mean_kl_high=0.022)
    far = replace(outcome.drift.plain, mean_kl=0.06, mean_kl_low=0.05, mean_kl_high=0.07)
    between = replace(near, mean_kl_high=0.055)
    said = {
        (near, far): "Mean KL 0.02 (0.018 to 0.022), plain rounding 0.06 (0.05 to 0.07): nearer by a factor of 3.0.",
        (far, near): "Mean KL 0.06 (0.05 to 0.07), plain rounding 0.02 (0.018 to 0.022): further away by a factor of 3.0.",
        (between, far): "Mean KL 0.02 (0.018 to 0.055), plain rounding 0.06 (0.05 to 0.07): about as near.",
        (near, None): "Mean KL 0.02 (0.018 to 0.022); beside plain rounding it was not measured (--plain).",
    }
    for (candidate, plain), sentence in said.items():
        text = to_html(replace(outcome, drift=replace(outcome.drift, candidate=candidate, plain=plain)))
        hero = text[text.index("<header") : text.index("</header>")]
        assert sentence in hero
        assert "How near is it to full precision?" in hero
    assert "How near is it" not in to_html(replace(outcome, drift=None))


@pytest.mark.parametrize(("share", "coarse"), [(0.61, True), (0.88, False)])
def test_a_coarse_file_that_passes_is_called_so(share: float, coarse: bool) -> None:
    """A q2_k file with 61% of the base's tokens was a pass without a word."""
    drift = example().drift
    assert drift is not None
    said = agreement_text(replace(drift, candidate=replace(drift.candidate, same_top=share)))
    assert said.startswith(f"The likeliest next token is the base's at {share:.1%} of the positions")
    assert ("larger type" in said) is coarse
