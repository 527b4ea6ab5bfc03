"""One style for every plot: the colours and the type of the HTML reports, in light and in dark.

The colours stand in `qguard_edge/data/report.css` alone, once for light and once for dark pages. A plot is drawn in the light
ones; an SVG file carries a rule for each that turns it into its dark partner where the reader's system is set to dark, background
included, so that it can be read on any page. Programs that know no such rules show the light picture.

No meaning rests on a colour alone: series also differ in marker or stand beside their name.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.atomic import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES = ("candidate", "plain", "series-3", "series-4", "series-5", "series-6", "base")
"""Colours of report.css for the lines of a plot, in the order in which they are taken."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (1, 3)), (0, (5, 1)), (0, (8, 3)))


@cache
def colours(dark: bool = False) -> Mapping[str, str]:
    """Names and colours of report.css, such as `candidate` and `#1f57c3`."""
    sheet = (resources.files("qguard_edge") / "data" / "report.css").read_text(encoding="utf-8")
    light, _, rest = sheet.partition("@media (prefers-color-scheme: dark)")
    part = rest.partition("\n}\n")[0] if dark else light.partition("\n}\n")[0]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part))


def series(i: int) -> str:
    """Colour of the i-th line of a plot."""
    return colours()[SERIES[i % len(SERIES)]]


@contextmanager
def style() -> Iterator[None]:
    """Figures that are made in the block have the style; matplotlib's own settings come back after it."""
    import matplotlib as mpl
    from cycler import cycler

    light = colours()
    ink, soft = light["ink"], light["soft"]
    settings: dict[Any, Any] = {
        "svg.hashsalt": "qguard-edge",  # the same bytes for the same plot
        "svg.fonttype": "none",  # words stay words: to be searched, and read aloud
        "font.size": 9.0,
        "axes.titlesize": 10.0,
        "axes.titleweight": "bold",
        "axes.labelcolor": soft,
        "axes.edgecolor": soft,
        "axes.facecolor": light["card"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=[light[name] for name in SERIES], marker=list(MARKERS)),
        "figure.facecolor": light["card"],
        "savefig.facecolor": light["card"],
        "grid.color": light["grid"],
        "legend.frameon": False,
        "text.color": ink,
        "xtick.color": soft,
        "ytick.color": soft,
    }
    with mpl.rc_context(settings):
        yield


def save(draw: Callable[[], "Figure"], path: Path) -> None:
    """Draw in the style and write; the file appears whole or not at all.

    Args:
        draw: makes the figure.
        path: output; the suffix (.svg, .png, .pdf) chooses the format.
    """
    form = path.suffix.lstrip(".") or "svg"
    with style(), atomic_path(path) as temporary:
        figure = draw()
        if form == "svg":
            temporary.write_text(svg_text(figure), encoding="utf-8")
        else:
            figure.savefig(temporary, format=form)
        figure.clear()


def svg_text(figure: "Figure") -> str:
    """A figure of `style` as SVG that is dark where the reader's system is."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return with_dark(text.getvalue())


def with_dark(svg: str) -> str:
    """An SVG document in the light colours, with the rules that make it dark where the reader's system is."""
    dark = colours(dark=True)
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark[name]}!important}}'
        for name, light in colours().items()
        for kind in ("fill", "stroke")
        if f"{kind}: {light}" in svg
    )
    sheet = (
        f"<style>text{{font-family:system-ui,sans-serif!important}}@media (prefers-color-scheme: dark){{{rules}}}</style>"
    )
    return re.sub(r"<svg[^>]*>\n", lambda opening: f"{opening.group()} {sheet}\n", svg, count=1)
