"""The scan as the first step of `qguard-edge convert`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from qguard_edge.cli.console import err, print_json
from quant_grids.errors import UnsupportedError

if TYPE_CHECKING:
    from qguard_edge.progress import Progress
    from qguard_edge.scan.findings import Finding
    from qguard_edge.scan.guard import RefusedError, ScanGuard

SCAN_PANEL = "Look before converting (see `qguard-edge scan`)"

NoScanFlag = Annotated[bool, typer.Option("--no-scan", help="Do not scan the model first.", rich_help_panel=SCAN_PANEL)]
AcceptFindingsFlag = Annotated[
    bool,
    typer.Option("--accept-findings", help="Convert even if the scan calls it dangerous.", rich_help_panel=SCAN_PANEL),
]

COLOURS = {"dangerous": "bold red", "suspicious": "yellow", "info": "dim"}


def check_scan_flags(no_scan: bool, accept: bool, keep: bool, verify: str | None) -> None:
    """Refuse combinations that contradict each other.

    Raises:
        UnsupportedError: naming them.
    """
    if no_scan and (accept or keep):
        flag = "--accept-findings" if accept else "--keep-flagged-f16"
        raise UnsupportedError(f"{flag} answers the scan, and --no-scan leaves it out: give one of them")
    if accept and keep:
        raise UnsupportedError(
            "--accept-findings quantizes flagged tensors and --keep-flagged-f16 does not: give one of them"
        )
    if keep and verify is None:
        raise UnsupportedError(
            "--keep-flagged-f16 converts a model that looks tampered with, so the result must be verified: add --verify all"
        )


def make_guard(accept: bool, keep: bool, threads: int, progress: "Progress") -> "ScanGuard":
    """What a conversion asks first."""
    from qguard_edge.scan.guard import ScanGuard

    return ScanGuard(accept=accept, keep=keep, threads=threads, progress=progress)


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
    err.print(f"[bold red]refused:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    if json_output:
        from qguard_edge.scan.report import finding_document

        listed = [finding_document(finding) for finding in error.findings]
        print_json({"status": "refused", "error": str(error), "findings": listed})


def print_finding(finding: "Finding") -> None:
    """One line on standard error."""
    colour = COLOURS[str(finding.severity)]
    text = escape(f"{finding.code} {finding.message}")
    err.print(f"[{colour}]{finding.severity}:[/] {text}", highlight=False, soft_wrap=True)


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


def guard_document(guard: "ScanGuard | None") -> dict[str, Any]:
    """The scan's part of the JSON document."""
    if guard is None:
        return {}
    from qguard_edge.scan.report import finding_document

    return {"scan": {"findings": [finding_document(found) for found in guard.findings], "kept": list(guard.kept)}}
