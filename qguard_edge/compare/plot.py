"""Plots as SVG or PNG files; the only home of matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from convert.atomic import atomic_path
from qguard_edge.compare.defenses import DefenseRow


def plot_compare(rows: Sequence[DefenseRow], title: str, path: Path) -> None:
    """KL against alignment, one point per defense with its bootstrap interval.

    Args:
        rows: from `compare_defenses`.
        title: above the plot.
        path: output; the suffix (.svg, .png, .pdf) chooses the format.
    """
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "qguard-edge"  # the same bytes for the same plot
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0))
    for row in rows:
        low, high = row.fidelity.mean_kl_interval
        kl = row.fidelity.mean_kl
        axes.errorbar(row.alignment, kl, yerr=[[kl - low], [high - kl]], fmt="o", capsize=3)
        axes.annotate(row.defense.name, (row.alignment, kl), xytext=(6, 5), textcoords="offset points")
    axes.set_xlabel("alignment with llama.cpp's own rounding (1: unchanged, 0: orthogonal)")
    axes.set_ylabel("mean KL to full precision (nats per token)")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "svg", metadata={"Date": None})
    pyplot.close(figure)
