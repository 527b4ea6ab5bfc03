"""One row of the tables of `scripts/studies/study_quantguard.py`, and the tables as Markdown."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What was measured; `same_top` is None in rows from before it was recorded."""

    victim: str
    model: str
    label: str
    to: str
    asr: float | None
    low: float
    high: float
    n: int
    kl: float
    kl_999: float
    perplexity_ratio: float
    flipped: float
    alignment: float
    alignment_learned: float | None
    seconds: float
    same_top: float | None = None
    peak_gib: float | None = None
    kl_unlike: float | None = None


def markdown(rows: list[Row]) -> str:
    """One table per victim and model."""
    lines: list[str] = []
    for key in dict.fromkeys((row.victim, row.model) for row in rows):
        mine = [row for row in rows if (row.victim, row.model) == key]
        asr = any(row.n for row in mine)
        unlike = any(row.kl_unlike is not None for row in mine)
        lines += [f"**{key[0]}, {key[1]}**" + (f" (n = {mine[0].n})" if asr else ""), ""]
        lines += [
            ("| arm | ASR (95%) " if asr else "| arm ")
            + ("| mean KL | on prose " if unlike else "| mean KL ")
            + "| KL 99.9% | same top | perplexity | flipped | alignment | s |"
        ]
        lines += ["|---" * (8 + asr + unlike) + "|"]
        for row in mine:
            shown = f"| {row.asr:.2f} ({row.low:.2f}-{row.high:.2f}) " if row.asr is not None else ""
            same = f"{row.same_top:.1%}" if row.same_top is not None else "-"
            prose = ("| - " if row.kl_unlike is None else f"| {row.kl_unlike:.4f} ") if unlike else ""
            several = len({other.to for other in mine if other.to not in other.label}) > 1
            name = f"{row.label} ({row.to})" if several and row.to not in row.label else row.label
            lines.append(
                f"| {name} {shown}| {row.kl:.4f} {prose}| {row.kl_999:.2f} | {same} | x{row.perplexity_ratio:.3f} "
                f"| {row.flipped:.1%} | {row.alignment:.2f} | {row.seconds:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)
