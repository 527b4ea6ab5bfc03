"""Markdown for pull requests and job summaries.

Everything that may come from a model or a user's file is escaped character by character: Markdown has no quoting that
hostile text could not end.
"""

import os
import re
from pathlib import Path

from qguard_edge.report.text import (
    HEADLINES,
    candidate_name,
    difference_text,
    number,
    numbers_of,
    one_line,
    percent,
    rate_text,
)
from qguard_edge.verify.results import Verdict, Verification

SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"
SIGNS = {Verdict.PASS: "✅", Verdict.FAIL: "❌", Verdict.INCONCLUSIVE: "❔"}
# What can begin a construct inside a line, bare addresses (`http://`, `www.`) included.
_SPECIAL = re.compile(r"[\\`*_\[\]<>|&#!~$@]|:(?=/)|(?<=www)\.", re.IGNORECASE)


def escaped(text: str) -> str:
    """A text on one line in which nothing is Markdown or HTML."""
    return _SPECIAL.sub(lambda found: "\\" + found[0], one_line(text))


def code(text: str) -> str:
    """A text in type-writer letters, in which nothing is Markdown, HTML or a mention."""
    return f"<code>{escaped(text)}</code>"


def to_markdown(outcome: Verification) -> str:
    """The outcome as a Markdown document."""
    base = outcome.file("base")
    against = f" against {code(base.name)}" if base else ""
    lines = [
        f"## {SIGNS[outcome.verdict]} {HEADLINES[outcome.verdict]}",
        "",
        f"{code(candidate_name(outcome))}{against}: {escaped(outcome.summary)}.",
        "",
        *([f"**{escaped(outcome.advice)}**", ""] if outcome.advice else []),
        *_table(outcome),
        "",
        *(f"- **{escaped(check.id)}**: {escaped(check.reason)}" for check in outcome.checks),
        "",
        *_findings(outcome),
        *_details("Warnings", outcome.warnings),
        *_details("What this does not show", outcome.limits),
        *_measured(outcome),
    ]
    return "\n".join(lines).rstrip() + "\n"


def append_summary(text: str) -> bool:
    """Append to the job summary of a GitHub action; False when this is none."""
    name = os.environ.get(SUMMARY_VARIABLE)
    if not name:
        return False
    with Path(name).open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    return True


def _table(outcome: Verification) -> list[str]:
    plain = any(check.plain for check in outcome.checks)
    head = ["check", "verdict", "candidate", "base", *(["plain"] if plain else []), "difference, points", "prompts"]
    rows = [head, ["---"] * len(head)]
    for check in outcome.checks:
        rates = [rate_text(check.candidate), rate_text(check.base), *([rate_text(check.plain)] if plain else [])]
        if check.candidate is None:
            rates = [dict(numbers_of(check, outcome)).get("candidate", ""), *[""] * (len(rates) - 1)]
        verdict = f"{SIGNS[check.verdict]} {check.verdict}"
        cells = [escaped(check.id), verdict, *rates, difference_text(check.difference), str(check.prompts)]
        rows.append(cells)
    return ["| " + " | ".join(row) + " |" for row in rows]


def _findings(outcome: Verification) -> list[str]:
    rows = [
        f"- {code(found.phrase)}: {found.candidate} of {found.n} answers, the base {found.base}"
        + (f", plain {found.plain}" if found.plain is not None else "")
        + f"; corrected p {found.adjusted_p:.2g} ({escaped(check.suite)})"
        for check in outcome.checks
        for found in check.findings
    ]
    return ["### Words and phrases", "", *rows, ""] if rows else []


def _details(title: str, sentences: tuple[str, ...]) -> list[str]:
    return [f"### {title}", "", *(f"- {escaped(sentence)}" for sentence in sentences), ""] if sentences else []


def _measured(outcome: Verification) -> list[str]:
    measured = outcome.measured
    manner = "greedy" if measured.temperature == 0 else f"{measured.samples} samples at {number(measured.temperature)}"
    lines = ["### How it was measured", "", f"- {manner}, seed {measured.seed}, {escaped(measured.machine)}"]
    lines.append("- " + ", ".join(f"{escaped(name)} {escaped(version)}" for name, version in measured.versions.items()))
    lines += [f"- {facts.role} {code(facts.name)}: {facts.size} bytes" + _hash(facts.sha256) for facts in outcome.files]
    if outcome.drift:
        lines.append(f"- same top token as the base: {percent(outcome.drift.candidate.same_top)}")
    return lines


def _hash(sha256: str) -> str:
    return f", SHA-256 {code(sha256)}" if sha256 else ""
