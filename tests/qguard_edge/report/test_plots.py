"""Plots and reports share their colours; they survive colour blindness, and follow the reader's light or dark."""

import re
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from qguard_edge.report.plots import LINES, MARKERS, SERIES, colours, save, series, style, with_dark

ROOT = Path(__file__).parents[3]
PICTURES = sorted((ROOT / "docs").glob("*.svg"))
TO_LMS = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
BLIND = {  # Vienot, Brettel and Mollon 1999: what is left of L, M, S without one kind of cone
    "protanopia": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
    "deuteranopia": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
}


def linear(colour: str) -> np.ndarray:
    """Linear RGB of `#rrggbb`."""
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB (D65)."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    f = np.cbrt(np.clip(xyz / (0.9505, 1.0, 1.089), 1e-6, None))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def seen(colour: str, kind: str | None) -> np.ndarray:
    """A colour as somebody with or without a kind of cone sees it."""
    rgb = linear(colour)
    return lab(rgb if kind is None else np.clip(np.linalg.inv(TO_LMS) @ BLIND[kind] @ TO_LMS @ rgb, 0, 1))


def contrast(one: str, other: str) -> float:
    """Of WCAG 2."""
    light = sorted(0.05 + linear(c) @ (0.2126, 0.7152, 0.0722) for c in (one, other))
    return float(light[1] / light[0])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", [None, *BLIND])
def test_base_plain_and_candidate_are_told_apart(kind: str | None, dark: bool) -> None:
    shade = colours(dark)
    for one, other in combinations(("candidate", "base", "plain"), 2):
        assert np.linalg.norm(seen(shade[one], kind) - seen(shade[other], kind)) > 20, (one, other)


def test_colours_that_look_alike_are_found() -> None:
    red, green = "#b04040", "#6a6a20"
    assert np.linalg.norm(seen(red, None) - seen(green, None)) > 40
    assert np.linalg.norm(seen(red, "deuteranopia") - seen(green, "deuteranopia")) < 20


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_lines_and_words_stand_out_from_the_page(dark: bool) -> None:
    shade = colours(dark)
    for name in SERIES:
        assert contrast(shade[name], shade["card"]) >= 3.0, name
    for name in ("ink", "soft"):
        assert contrast(shade[name], shade["card"]) >= 4.5
    assert set(colours(True)) == set(colours(False))


def test_series_differ_in_more_than_colour() -> None:
    assert len(SERIES) == len(set(MARKERS)) == len({str(line) for line in LINES})
    assert len({series(i) for i in range(len(SERIES))}) == len(SERIES)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_pictures_of_the_documents_have_the_style(picture: Path) -> None:
    text = picture.read_text()
    ET.fromstring(text)
    assert "@media (prefers-color-scheme: dark)" in text
    ours = {*colours(False).values(), *colours(True).values()}
    assert set(re.findall(r"#[0-9a-f]{6}\b|#[0-9a-f]{3}\b", re.sub(r'"#\w+"|\(#\w+\)', "", text))) <= ours


def test_a_plot_is_dark_where_the_reader_is(tmp_path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    def draw() -> Figure:
        figure = Figure()
        figure.subplots().plot([0, 1], [0, 1], label="a line")
        figure.axes[0].set_title("a title")
        return figure

    before = dict(mpl.rcParams)
    save(draw, tmp_path / "a.svg")
    save(draw, tmp_path / "b.svg")
    save(draw, tmp_path / "a.png")
    assert dict(mpl.rcParams) == before
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert ">a title</text>" in text
    light, dark = colours(False), colours(True)
    for kind, name in (("fill", "card"), ("fill", "ink"), ("stroke", "candidate")):
        assert f"{kind}: {light[name]}" in text
        assert f'[style*="{kind}: {light[name]}"]{{{kind}:{dark[name]}!important}}' in text
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_rules_are_written_for_colours_that_occur_only() -> None:
    with style():
        text = with_dark(f'<svg width="1">\n<path style="fill: {colours()["plain"]}"/></svg>')
    assert text.count("!important}") == 2  # the type, and one colour
    assert text.startswith('<svg width="1">\n <style>')
