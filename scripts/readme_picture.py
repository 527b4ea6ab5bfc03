"""The pictures of the README, from the lab's result files.

Run: python scripts/readme_picture.py

docs/first-picture.svg shows attack success before and after, and the distance to full precision (docs/results/feedback and
docs/results/types.jsonl); docs/real-picture.svg each defense on the real model, attack success against what it costs the clean
model (docs/results/real). A test compares what is drawn with those files, so it cannot fall behind.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qguard_edge.lab.results import read_result
from qguard_edge.report.plots import MARKERS, colours, save, series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
REAL_PICTURE = ROOT / "docs" / "real-picture.svg"
PICTURE = ROOT / "docs" / "first-picture.svg"
RESULTS = {
    "Mind the Gap, Q4_K": "tiny-mind-the-gap-q4_k-injection.json",
    "uniform boxes, Q4_0": "tiny-uniform-q4_0-injection.json",
}
TYPES = {"q4_k": "Q4_K_M", "q4_0": "Q4_0"}
ARMS = {"full precision": "fp", "llama.cpp's own": "none", "hardened": "feedback"}
COLOURS = ("base", "plain", "candidate")
"""Of the arms, in report.css."""


def arms_of(name: str) -> dict[str, Any]:
    """The arms of a lab run, by name."""
    read = json.loads((ROOT / "docs" / "results" / "feedback" / name).read_text(encoding="utf-8"))
    return {arm["name"]: arm for arm in read["arms"]}


def shares() -> list[list[float]]:
    """Attack success of each arm, for each victim."""
    found = []
    for file in RESULTS.values():
        arms = arms_of(file)
        rates = [arms[f"attacked {arm}"]["asr"] for arm in ARMS.values()]
        found.append([rate["hits"] / rate["n"] for rate in rates])
    return found


def distances() -> list[list[float]]:
    """Mean KL on held-out answers, plain and hardened, for each type."""
    lines = (ROOT / "docs" / "results" / "types.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {(row["to"], row["arm"]): row["answers"] for row in map(json.loads, lines)}
    return [[rows[to, "plain"], rows[to, "feedback"]] for to in TYPES]


def draw() -> "Figure":
    """The picture, whose words and numbers stay text."""
    from matplotlib.figure import Figure

    shade = [colours()[name] for name in COLOURS]
    figure = Figure(figsize=(8.0, 3.3))
    left, right = figure.subplots(1, 2)
    for i, values in enumerate(shares()):
        for j, (kind, value) in enumerate(zip(ARMS, values, strict=True)):
            at = i + 0.27 * (j - 1)
            left.bar(at, value, 0.25, color=shade[j], label=kind if i == 0 else None)
            left.text(at, value + 0.02, f"{value:.0%}", ha="center")
    for i, values in enumerate(distances()):
        for j, value in enumerate(values):
            at = i + 0.27 * (j - 0.5)
            right.bar(at, value, 0.25, color=shade[1 + j])
            right.text(at, value + 0.02, f"{value:.3f}", ha="center")
    left.set_title("Answers with the hidden advertisement")
    right.set_title("SmolLM2: mean KL to full precision")
    left.set_yticks([0.0, 0.5, 1.0])
    for axes, names in ((left, RESULTS), (right, TYPES.values())):
        axes.set_xticks(range(len(names)), list(names))
        axes.tick_params("x", length=0)
        axes.grid(visible=False, axis="x")
        axes.margins(y=0.1)
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    figure.legend(loc="upper center", ncols=3)
    return figure


@dataclass(frozen=True)
class Dot:
    """A defense on one victim of the real model.

    Attributes:
        defense: such as `feedback`; `none` is plain rounding.
        success: of the attack, in percent, with the ends of its 95% Wilson interval.
        distance: mean KL of the clean model with that defense, over the same with plain rounding.
    """

    defense: str
    success: tuple[float, float, float]
    distance: float


def dots() -> list[Dot]:
    """Every defense on every valid victim in docs/results/real."""
    found = []
    for path in sorted((ROOT / "docs" / "results" / "real").glob("*.json")):
        result = read_result(path)
        arms = {arm.name: arm for arm in result.arms}
        plain = arms["clean none"].fidelity
        for arm in result.arms if result.validity.valid else ():
            clean = arms.get(f"clean {arm.defense}")
            if arm.model == "attacked" and arm.defense and clean and clean.fidelity and plain:
                rate = arm.asr
                shown = 100 * rate.value, 100 * rate.low, 100 * rate.high
                found.append(Dot(arm.defense, shown, clean.fidelity.mean_kl / plain.mean_kl))
    return found


def draw_real() -> "Figure":
    """A dot per victim and defense, with the interval of its attack success."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.3))
    axes = figure.subplots()
    every = dots()
    for i, defense in enumerate(dict.fromkeys(dot.defense for dot in every)):
        mine = [dot for dot in every if dot.defense == defense]
        for dot in mine:
            axes.vlines(dot.distance, *dot.success[1:], color=series(i), linewidth=1.5)
        axes.plot(
            [dot.distance for dot in mine], [dot.success[0] for dot in mine],
            color=series(i), marker=MARKERS[i % len(MARKERS)], linestyle="",
            label={"none": "llama.cpp's own"}.get(defense, defense),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20], ["0.05", "0.1", "0.2", "0.5", "1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xlabel("the clean model's mean KL to full precision, times plain rounding's")
    axes.set_ylabel("attack success, %")
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    figure.legend(loc="upper center", ncols=6)
    return figure


if __name__ == "__main__":
    for picture, path in ((draw, PICTURE), (draw_real, REAL_PICTURE)):
        save(picture, path)
        print(f"wrote {path.name}")
