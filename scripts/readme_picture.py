"""The picture of the README: attack success before and after, and distance to full precision, from the lab's result files.

Run: python scripts/readme_picture.py

Writes docs/first-picture.svg from docs/results/feedback and docs/results/types.jsonl; a test compares the numbers in it with
those files, so it cannot fall behind them.
"""

import io
import json
from pathlib import Path
from typing import Any

from convert.atomic import atomic_path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "first-picture.svg"
RESULTS = {
    "Mind the Gap, Q4_K": "tiny-mind-the-gap-q4_k-injection.json",
    "uniform boxes, Q4_0": "tiny-uniform-q4_0-injection.json",
}
TYPES = {"q4_k": "Q4_K_M", "q4_0": "Q4_0"}
ARMS = {"full precision": "fp", "llama.cpp's own": "none", "hardened": "feedback"}
COLOURS = ("#999999", "#d55e00", "#0072b2")  # told apart by colour-blind readers (Okabe and Ito)


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


def draw() -> str:
    """The picture as SVG text, whose words and numbers stay text."""
    import matplotlib as mpl

    mpl.rcParams["svg.hashsalt"] = "qguard-edge"
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 2.9))
    left, right = figure.subplots(1, 2)
    for i, values in enumerate(shares()):
        for j, (kind, value) in enumerate(zip(ARMS, values, strict=True)):
            at = i + 0.27 * (j - 1)
            left.bar(at, value, 0.25, color=COLOURS[j], label=kind if i == 0 else None)
            left.text(at, value + 0.02, f"{value:.0%}", ha="center", fontsize=8)
    for i, values in enumerate(distances()):
        for j, value in enumerate(values):
            at = i + 0.27 * (j - 0.5)
            right.bar(at, value, 0.25, color=COLOURS[1 + j])
            right.text(at, value, f"{value:.3f}", ha="center", va="bottom", fontsize=8)
    left.set_title("answers with the hidden advertisement", fontsize=10)
    right.set_title("SmolLM2: mean KL to full precision", fontsize=10)
    for axes, names in ((left, RESULTS), (right, TYPES.values())):
        axes.set_xticks(range(len(names)), list(names), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
    left.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.55, 1.02))
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


if __name__ == "__main__":
    with atomic_path(PICTURE) as temporary:
        temporary.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE.name}")
