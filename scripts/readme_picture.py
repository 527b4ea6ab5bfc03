"""The picture of the README: attack success before and after, and distance to full precision, from the lab's result files.

Run: python scripts/readme_picture.py

Writes docs/first-picture.svg from docs/results/feedback and docs/results/types.jsonl; a test compares the numbers in it with
those files, so it cannot fall behind them.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qguard_edge.report.plots import colours, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
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


if __name__ == "__main__":
    save(draw, PICTURE)
    print(f"wrote {PICTURE.name}")
