"""What `scripts/studies/study_scan.py` keeps of one scan; its tables as Markdown, and the ROC plot."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qguard_edge.report.plots import LINES, save
from qguard_edge.verify.statistics import wilson

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Row:
    """One scan.

    Attributes:
        name: of the model.
        group: its row in the table.
        precision: f32 or bf16.
        attack: empty for clean models.
        to: the attacked type.
        severity: the worst finding's, or "none".
        found: codes with their severity and type.
        peaks: per type, height of the whole model's peak.
        bands: per type, the emptiest band.
        outliers: largest share of blotted chunks.
        ratio: largest typical ratio of a matrix.
    """

    name: str
    group: str
    precision: str
    attack: str
    to: str
    severity: str
    found: list[tuple[str, str, str]]
    peaks: dict[str, float]
    bands: dict[str, float]
    outliers: float
    ratio: float
    dose: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Identifies the row in --out."""
        return f"{self.name} {self.precision}"


def hit(row: Row) -> bool:
    """Whether an attacked model has a dangerous finding of the kind its attack leaves."""
    wanted = {"QG201"} if row.attack == "outlier" else {"QG301", "QG302"}
    return any(code in wanted and severity == "dangerous" for code, severity, _ in row.found)


def share_text(hits: int, n: int) -> str:
    """`3 of 3 (44% to 100%)`."""
    if n == 0:
        return "-"
    interval = wilson(hits, n)
    return f"{hits} of {n} ({interval[0]:.0%} to {interval[1]:.0%})"


def tables(rows: list[Row]) -> list[str]:
    """Both tables as Markdown."""
    lines = [
        "| clean models | precision | dangerous | suspicious | highest peak | largest share of chunks |",
        "|" + "---|" * 6,
    ]
    clean = [row for row in rows if not row.attack]
    for group in dict.fromkeys(row.group for row in clean):
        for precision in ("f32", "bf16"):
            mine = [row for row in clean if row.group == group and row.precision == precision]
            if mine:
                peak = max((value for row in mine for value in row.peaks.values()), default=float("nan"))
                dangerous = share_text(sum(row.severity == "dangerous" for row in mine), len(mine))
                suspicious = share_text(sum(row.severity == "suspicious" for row in mine), len(mine))
                blotted = max(row.outliers for row in mine)
                lines.append(f"| {group} | {precision} | {dangerous} | {suspicious} | {peak:.2f} | {blotted:.3%} |")
    lines += ["", "| attack and type | found at f32 | found at bf16 | lowest statistic f32 / bf16 |", "|" + "---|" * 4]
    attacked = [row for row in rows if row.attack]
    for group in dict.fromkeys(row.group for row in attacked):
        cells = []
        for precision in ("f32", "bf16"):
            mine = [row for row in attacked if row.group == group and row.precision == precision]
            cells.append((share_text(sum(map(hit, mine)), len(mine)), min((score(row) for row in mine), default=0.0)))
        lines.append(f"| {group} | {cells[0][0]} | {cells[1][0]} | {cells[0][1]:.2f} / {cells[1][1]:.2f} |")
    return lines


def score(row: Row) -> float:
    """The statistic that the decision rests on: the highest peak over types, for outliers the share of chunks."""
    return row.outliers if row.attack == "outlier" else max(row.peaks.values(), default=0.0)


def area(clean: list[float], attacked: list[float]) -> float:
    """Area under the ROC curve: how often an attacked model scores higher."""
    pairs = [(a > c) + 0.5 * (a == c) for a in attacked for c in clean]
    return sum(pairs) / len(pairs) if pairs else float("nan")


def curve_of(clean: list[float], attacked: list[float]) -> tuple[list[float], list[float]]:
    """False and true positive rates over all thresholds."""
    limits = sorted({*clean, *attacked}, reverse=True)
    xs = [0.0, *(sum(c >= t for c in clean) / len(clean) for t in limits)]
    ys = [0.0, *(sum(a >= t for a in attacked) / len(attacked) for t in limits)]
    return xs, ys


def roc_sets(rows: list[Row]) -> dict[str, tuple[list[float], list[float]]]:
    """Scores of clean and attacked models, per question."""
    sets = {}
    for precision in ("f32", "bf16"):
        mine = [row for row in rows if row.precision == precision]
        clean = [score(row) for row in mine if not row.attack and row.peaks]
        sets[f"boxes, {precision}"] = (clean, [score(row) for row in mine if row.attack and row.attack != "outlier"])
        sets[f"outliers, {precision}"] = (
            [row.outliers for row in mine if row.attack != "outlier"],
            [row.outliers for row in mine if row.attack == "outlier"],
        )
    doses = [(bool(row.attack), -point["ratio"]) for row in rows for point in row.dose.values()]
    if doses:
        sets["dose curve, f32"] = ([s for bad, s in doses if not bad], [s for bad, s in doses if bad])
    return {name: pair for name, pair in sets.items() if pair[0] and pair[1]}


def plot(sets: dict[str, tuple[list[float], list[float]]], path: Path) -> None:
    """The ROC plot."""
    save(lambda: draw(sets), path)


def draw(sets: dict[str, tuple[list[float], list[float]]]) -> "Figure":
    """The figure of `plot`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.6))
    axes = figure.subplots()
    for i, (name, (clean, attacked)) in enumerate(sets.items()):
        xs, ys = curve_of(clean, attacked)
        label = f"{name}: {area(clean, attacked):.3f} ({len(clean)} clean, {len(attacked)} attacked)"
        line: Any = LINES[i % len(LINES)]
        axes.plot(xs, ys, linestyle=line, marker="", label=label, drawstyle="steps-post", linewidth=2)
    axes.set_xlabel("clean models flagged")
    axes.set_ylabel("attacked models flagged")
    axes.set_xlim(-0.02, 1.0)
    axes.set_ylim(0.0, 1.02)
    axes.legend(loc="lower right", fontsize=8, title="area under the curve", title_fontsize=8)
    figure.tight_layout()
    return figure
