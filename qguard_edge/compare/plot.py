"""The plot of `compare`: what each defense costs in fidelity, against what it leaves of plain rounding."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qguard_edge.compare.defenses import DefenseRow
from qguard_edge.report.plots import MARKERS, save, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_compare(rows: Sequence[DefenseRow], title: str, path: Path) -> None:
    """KL against alignment, one point per defense with its bootstrap interval.

    Args:
        rows: from `compare_defenses`.
        title: above the plot.
        path: output; the suffix (.svg, .png, .pdf) chooses the format.
    """
    save(lambda: draw_compare(rows, title), path)


def draw_compare(rows: Sequence[DefenseRow], title: str) -> "Figure":
    """The figure of `plot_compare`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0))
    axes = figure.subplots()
    middle = (min(row.alignment for row in rows) + max(row.alignment for row in rows)) / 2
    for i, row in enumerate(rows):
        low, high = row.fidelity.mean_kl_interval
        kl = row.fidelity.mean_kl
        axes.errorbar(
            row.alignment, kl, yerr=[[kl - low], [high - kl]], fmt=MARKERS[i % len(MARKERS)], color=series(i), capsize=3
        )
        right = row.alignment > middle  # a label may not leave the frame
        axes.annotate(
            row.defense.name,
            (row.alignment, kl),
            xytext=(-6 if right else 6, 5),
            textcoords="offset points",
            ha="right" if right else "left",
        )
    axes.set_xlabel("alignment with llama.cpp's own rounding (1: unchanged, 0: orthogonal)")
    axes.set_ylabel("mean KL to full precision (nats per token)")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    figure.tight_layout()
    return figure
