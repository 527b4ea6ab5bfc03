"""Sweep each defense's main option on the lab's victims: attack success against fidelity, the Pareto front, and a plot.

Run: python scripts/studies/sweep_defenses.py --victims mind-the-gap:q4_k,uniform:q4_0
    --out docs/results/sweeps/options.json --plot docs/sweep-options.svg

Victims come from the lab's cache or are made now. For every setting: the attacked model hardened (attack success with its
Wilson interval, mean KL to the attacked full precision) and the clean model hardened (mean KL to the clean full precision).
Prints Markdown; the last line is one JSON object.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qguard_edge.defenses.options import (
    DefenseOptions,
    FlipGuardOptions,
    NoiseOptions,
    OrthoOptions,
    QVecOptions,
)
from qguard_edge.lab.results import LabResult
from qguard_edge.lab.runner import LabSettings, run_lab
from qguard_edge.report.plots import MARKERS, colours, save, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SWEEP: tuple[DefenseOptions, ...] = (
    *(OrthoOptions(target=c, width=0.0) for c in (0.75, 0.5, 0.25, 0.0, -0.25)),
    *(OrthoOptions(target=0.0, width=w) for w in (0.1, 0.3, 0.5, 1.0)),
    *(FlipGuardOptions(share=share) for share in (0.02, 0.05, 0.1, 0.2)),
    *(QVecOptions(strength=strength) for strength in (0.1, 0.25, 0.5)),
    *(NoiseOptions(relative=relative) for relative in (0.1, 0.3, 0.6, 1.0)),
)
WIDTHS: tuple[DefenseOptions, ...] = (
    *(OrthoOptions(target=0.0, width=w) for w in (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)),
    OrthoOptions(target=-0.5, width=0.5),
    OrthoOptions(target=-0.5, width=1.0),
    NoiseOptions(relative=0.6),
    NoiseOptions(relative=1.0),
)
DOSES: tuple[DefenseOptions, ...] = tuple(OrthoOptions(target=c) for c in (0.25, 0.0, -0.1, -0.25, -0.5))
COLUMNS = 3
SETTINGS = {"sweep": SWEEP, "widths": WIDTHS, "doses": DOSES}


@dataclass(frozen=True)
class Point:
    """One setting on one victim."""

    victim: str
    setting: str
    asr: float
    low: float
    high: float
    n: int
    attacked_kl: float
    clean_kl: float
    flipped: float


def points_of(victim: str, result: LabResult) -> list[Point]:
    """All quantized arms, attacked and clean joined by defense."""
    arms = {arm.name: arm for arm in result.arms}
    points = []
    for name, arm in arms.items():
        clean = arms.get(name.replace("attacked", "clean", 1))
        if arm.model != "attacked" or arm.fidelity is None or clean is None or clean.fidelity is None:
            continue
        points.append(
            Point(
                victim=victim,
                setting=str(arm.defense),
                asr=arm.asr.value,
                low=arm.asr.low,
                high=arm.asr.high,
                n=arm.asr.n,
                attacked_kl=arm.fidelity.mean_kl,
                clean_kl=clean.fidelity.mean_kl,
                flipped=arm.flipped or 0.0,
            )
        )
    return points


def markdown(victim: str, points: list[Point]) -> str:
    """One table."""
    lines = [
        f"### {victim}",
        "",
        "| setting | ASR (95%) | n | KL attacked | KL clean | flipped |",
        "|---|---|---|---|---|---|",
    ]
    for p in points:
        rate = f"{p.asr:.2f} ({p.low:.2f}-{p.high:.2f})"
        lines.append(f"| {p.setting} | {rate} | {p.n} | {p.attacked_kl:.5f} | {p.clean_kl:.5f} | {p.flipped:.1%} |")
    return "\n".join(lines) + "\n"


def front(points: list[Point]) -> list[Point]:
    """Pareto front of attack success against the clean model's KL: nobody is better in both."""
    best, kept = 2.0, []
    for point in sorted(points, key=lambda p: (p.clean_kl, p.asr)):
        if point.asr < best:
            kept.append(point)
            best = point.asr
    return kept


def plot(points: list[Point], path: Path) -> None:
    """One panel per victim: attack success against KL on the clean model, one colour per defense, and the Pareto front."""
    save(lambda: draw(points), path)


def draw(points: list[Point]) -> "Figure":
    """The figure of `plot`."""
    from matplotlib.figure import Figure

    victims = list(dict.fromkeys(point.victim for point in points))
    rows = -(-len(victims) // COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 3.4 * rows))
    panels = figure.subplots(rows, COLUMNS, squeeze=False, sharey=True)
    for axes, victim in zip(panels.flat, victims, strict=False):
        here = [p for p in points if p.victim == victim]
        for i, name in enumerate(dict.fromkeys(point.setting.split()[0] for point in points)):
            mine = [p for p in here if p.setting.split()[0] == name]
            errors = [[p.asr - p.low for p in mine], [p.high - p.asr for p in mine]]
            at = ([p.clean_kl for p in mine], [p.asr for p in mine])
            axes.errorbar(*at, yerr=errors, fmt=MARKERS[i % len(MARKERS)], color=series(i), label=name)
        line = front(here)
        style: dict[str, Any] = {"color": colours()["soft"], "marker": "", "drawstyle": "steps-post", "zorder": 0}
        axes.plot([p.clean_kl for p in line], [p.asr for p in line], **style)
        axes.set_xscale("log")
        axes.set_title(victim)
        axes.set_xlabel("mean KL of the clean model")
        axes.set_ylabel("attack success rate")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    for axes in list(panels.flat)[len(victims) :]:
        axes.axis("off")
    figure.legend(handles, labels, loc="lower right", bbox_to_anchor=(0.95, 0.12))
    figure.tight_layout()
    return figure


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", default="mind-the-gap:q4_k,uniform:q4_0,mind-the-gap:q6_k,uniform:q8_0")
    parser.add_argument("--scenario", default="injection")
    parser.add_argument("--settings", choices=tuple(SETTINGS), default="sweep")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--redraw", type=Path, metavar="FILE", help="only draw --plot from what --out wrote")
    arguments = parser.parse_args()
    if arguments.redraw:
        plot([Point(**point) for point in json.loads(arguments.redraw.read_text())["points"]], arguments.plot)
        return
    settings = SETTINGS[arguments.settings]
    points: list[Point] = []
    for victim in arguments.victims.split(","):
        attack, _, to = victim.partition(":")
        lab = LabSettings(attack=attack, to=to, scenario=arguments.scenario, defenses=settings, threads=arguments.threads)
        with tempfile.TemporaryDirectory() as folder:
            result = run_lab(lab, Path(folder))
        if not result.validity.valid:
            print(f"### {victim}\n\nnot a valid victim: {' '.join(result.validity.reasons)}\n")
            continue
        found = points_of(victim, result)
        points += found
        print(markdown(victim, found), flush=True)
    document = {"scenario": arguments.scenario, "points": [asdict(point) for point in points]}
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.plot and points:
        plot(points, arguments.plot)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
