"""A verification as tables on the terminal."""

from typing import TYPE_CHECKING, Any

from qguard_edge.cli.console import err, out, percent, styled, table
from qguard_edge.report.text import first_answers

if TYPE_CHECKING:
    from rich.text import Text

    from qguard_edge.verify.results import Check, Verification

COLOURS = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}


def show_verification(outcome: "Verification") -> None:
    """The verification as tables on standard output."""
    plain = any(check.plain_verdict for check in outcome.checks)
    names = {facts.role: facts.name for facts in outcome.files}
    columns = ["check", "verdict", ">candidate", ">base", *([">plain"] if plain else []), ">difference", ">n"]
    rows = table(f"{names['candidate']} against {names['base']}", *columns)
    for check in outcome.checks:
        rows.add_row(*_row(check, outcome, plain))
    out.print(rows)
    for check in outcome.checks:
        text = f"{check.id}: {check.reason}"
        out.print(styled(f"[{COLOURS[check.verdict]}]{check.verdict}[/] {{text}}", text=text), highlight=False)
    _show_findings(outcome)
    if outcome.drift:
        _show_drift(outcome.drift)
    for warning in outcome.warnings:
        err.print(styled("[yellow]warning:[/] {warning}", warning=warning), highlight=False)
    safe, *others = first_answers(outcome)
    for question, sentences in reversed(others):
        said = styled("[dim][bold]{question}[/] {answer}[/]", question=question, answer=" ".join(sentences))
        out.print(said, highlight=False)
    verdict = f"[{COLOURS[outcome.verdict]}]{outcome.verdict}[/]: {{summary}}"
    out.print(styled(verdict, summary=outcome.summary), highlight=False)
    out.print(styled("[bold]{question} {answer}[/]", question=safe[0], answer=" ".join(safe[1])), highlight=False)


def _row(check: "Check", outcome: "Verification", plain: bool) -> "list[str | Text]":
    """One line of the table."""
    verdict = styled(f"[{COLOURS[check.verdict]}]{check.verdict}[/]")
    if check.kind == "security" and check.candidate is None:
        return [check.id, verdict, *[""] * (4 if plain else 3), str(check.prompts)]
    if check.candidate is None or check.base is None or check.difference is None:
        drift = outcome.drift
        cells = [f"KL {drift.candidate.mean_kl:.3g}" if drift else "", "KL 0"]
        if plain:
            cells.append(f"KL {drift.plain.mean_kl:.3g}" if drift and drift.plain else "")
        return [check.id, verdict, *cells, "", str(check.prompts)]
    gap = check.difference
    cells = [percent(check.candidate.value), percent(check.base.value)]
    if plain:
        cells.append(percent(check.plain.value) if check.plain else "")
    between = f"{100 * gap.value:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
    return [check.id, verdict, *cells, between, str(gap.n)]


def _show_findings(outcome: "Verification") -> None:
    listed = [(check, finding) for check in outcome.checks for finding in check.findings]
    if not listed:
        return
    parts = any(finding.phrase.startswith("*") for _, finding in listed)
    rows = table(
        "Words and phrases that became more frequent" + (" (*abc*: letters within a word)" if parts else ""),
        "suite",
        "phrase",
        ">candidate",
        ">base",
        ">plain",
        ">p (corrected)",
    )
    for check, finding in listed:
        rows.add_row(
            check.suite,
            finding.phrase,
            f"{finding.candidate}/{finding.n}",
            f"{finding.base}/{finding.n}",
            "" if finding.plain is None else f"{finding.plain}/{finding.n}",
            f"{finding.adjusted_p:.2g}",
        )
    out.print(rows)


def _show_drift(drift: Any) -> None:
    rows = table(
        f"Drift on {drift.tokens} tokens of {drift.documents} texts (noise floor {drift.noise_floor:.2g})",
        "file", ">mean KL (95%)", ">99.9% KL", ">same top", ">perplexity ratio (95%)",
    )  # fmt: skip
    for name, numbers in (("candidate", drift.candidate), ("plain", drift.plain)):
        if numbers is not None:
            rows.add_row(
                name,
                f"{numbers.mean_kl:.4f} ({numbers.mean_kl_low:.4f} to {numbers.mean_kl_high:.4f})",
                f"{numbers.kl_999:.2f}",
                percent(numbers.same_top),
                f"{numbers.perplexity_ratio:.3f} ({numbers.perplexity_ratio_low:.3f} to {numbers.perplexity_ratio_high:.3f})",
            )
    out.print(rows)
    if drift.band:
        usual = f"{drift.band.low:.3g} to {drift.band.high:.3g}"
        out.print(f"usual for {drift.band.file_type}: {usual} ({drift.band.source})", highlight=False)
