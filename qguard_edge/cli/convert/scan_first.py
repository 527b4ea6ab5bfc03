"""The scan as the first step of `qguard-edge convert`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from qguard_edge.cli.console import err, print_json, say, styled

if TYPE_CHECKING:
    from qguard_edge.scan.findings import Finding
    from qguard_edge.scan.guard import RefusedError, ScanGuard

COLOURS = {"dangerous": "bold red", "suspicious": "yellow", "info": "dim"}


@contextmanager
def refusals(json_output: bool) -> Iterator[None]:
    """Turn a refusal into its message and the exit code of a negative verdict."""
    from qguard_edge.scan.guard import RefusedError

    try:
        yield
    except RefusedError as error:
        _show_refusal(error, json_output)
        raise typer.Exit(1) from None


def _show_refusal(error: "RefusedError", json_output: bool) -> None:
    for finding in error.findings:
        print_finding(finding)
    say(err, styled("[bold red]refused:[/] {error}", error=error))
    if json_output:
        from qguard_edge.scan.report import refusal_document

        print_json(refusal_document(error))


def print_finding(finding: "Finding") -> None:
    """One line on standard error."""
    colour = COLOURS[str(finding.severity)]
    text = f"{finding.code} {finding.message}"
    say(err, styled(f"[{colour}]{finding.severity}:[/] {{text}}", text=text))


def show_findings(guard: "ScanGuard", quiet: bool) -> None:
    """What was found in a model that was converted all the same; notes of no consequence are left to `qguard-edge scan`."""
    from qguard_edge.scan.findings import Severity

    if quiet:
        return
    for finding in guard.findings:
        if finding.severity is not Severity.INFO:
            print_finding(finding)
    if guard.kept:
        err.print(f"kept {len(guard.kept)} flagged tensors in full precision", highlight=False)
