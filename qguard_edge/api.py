"""The public functions: what the commands of `qguard-edge` do, with requests in and reports out.

    request_for -> convert -> report        plan -> apply        scan, verify, diff, inspect, compare        baseline -> check

Import from `qguard_edge`; docs/python.md says what may be relied on. Nothing here prints: a function returns a report, logs
under the name of its module, and raises a `QGuardError` whose text is a sentence for the user. Files appear whole or not at
all. Each function imports what it needs, so that `plan` runs where llama.cpp is not installed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from qguard_edge.defenses.options import DATA_FREE, DEFAULT_DEFENSE, DefenseOptions, parse_defense
from qguard_edge.progress import NoProgress, Progress
from quant_grids.errors import UnsupportedError

if TYPE_CHECKING:
    from convert.diff import FileDifference
    from convert.inspection import GgufSummary
    from convert.split import SplitRule
    from qguard_edge.compare.defenses import DefenseRow
    from qguard_edge.conversion.dry_run import DryRun
    from qguard_edge.conversion.outputs.plan import ApplyReport
    from qguard_edge.conversion.report import ConversionReport, FolderReport, GgufReport, MovedGgufReport, PlanReport
    from qguard_edge.conversion.request import (
        ConversionRequest,
        FolderRequest,
        GgufRequest,
        MovedGgufRequest,
        PlanRequest,
    )
    from qguard_edge.packs.check import CheckRequest
    from qguard_edge.packs.pack import Pack
    from qguard_edge.packs.record import BaselineRequest
    from qguard_edge.scan.findings import Severity
    from qguard_edge.scan.guard import RefusedError, ScanGuard
    from qguard_edge.scan.results import Scan
    from qguard_edge.scan.run import ScanRequest
    from qguard_edge.verify.choose import SuiteChoice
    from qguard_edge.verify.results import Verification
    from qguard_edge.verify.verifier import VerifyRequest

    Document = ConversionReport | Scan | Verification | FileDifference | GgufSummary | RefusedError


@overload
def convert(
    request: "MovedGgufRequest",
    *,
    scan: "ScanGuard | bool" = ...,
    verify: "SuiteChoice | None" = ...,
    verify_limit: int | None = ...,
    progress: Progress | None = ...,
) -> "MovedGgufReport": ...
@overload
def convert(
    request: "GgufRequest",
    *,
    scan: "ScanGuard | bool" = ...,
    verify: "SuiteChoice | None" = ...,
    verify_limit: int | None = ...,
    progress: Progress | None = ...,
) -> "GgufReport": ...
@overload
def convert(
    request: "FolderRequest",
    *,
    scan: "ScanGuard | bool" = ...,
    verify: "SuiteChoice | None" = ...,
    verify_limit: int | None = ...,
    progress: Progress | None = ...,
) -> "FolderReport": ...
@overload
def convert(
    request: "GgufRequest | MovedGgufRequest | FolderRequest",
    *,
    scan: "ScanGuard | bool" = ...,
    verify: "SuiteChoice | None" = ...,
    verify_limit: int | None = ...,
    progress: Progress | None = ...,
) -> "GgufReport | MovedGgufReport | FolderReport": ...
def convert(
    request: "GgufRequest | MovedGgufRequest | FolderRequest",
    *,
    scan: "ScanGuard | bool" = True,
    verify: "SuiteChoice | None" = None,
    verify_limit: int | None = None,
    progress: Progress | None = None,
) -> "GgufReport | MovedGgufReport | FolderReport":
    """Convert a model, as `qguard-edge convert` does.

    Args:
        request: what to make of which model, see `request_for`.
        scan: scan the model first and refuse it if the scan calls it dangerous; False: no scan; a `ScanGuard` says what
            to do with findings and holds them afterwards.
        verify: suites that the result must pass before it gets its name, such as `"all"` or `"injection,drift"`; None: none.
            With a failing verdict the file is named `NAME.rejected.gguf`, and `report.verification` says why.
        verify_limit: prompts per suite, and texts, at most; None: all.
        progress: told about each stage.

    Raises:
        RefusedError: the scan found something dangerous.
        QGuardError: another of its kinds; nothing is left under the final name.
    """
    from qguard_edge.conversion.run import convert_model

    progress = progress or NoProgress()
    gate = None
    if verify is not None:
        from qguard_edge.conversion.gate import gate_for

        gate = gate_for(request, verify, progress, limit=verify_limit)
    guard = _guard(scan, request, progress)
    if guard and guard.keep and gate is None:
        raise UnsupportedError(
            "--keep-flagged-f16 converts a model that looks tampered with, so the result must be verified: add --verify all"
        )
    return convert_model(request, progress, gate, guard)


def dry_run(request: "GgufRequest | FolderRequest") -> "DryRun":
    """What a conversion would do: each tensor's type, sizes, memory. Writes nothing.

    Raises:
        QGuardError: what the conversion would meet before it quantizes.
    """
    from qguard_edge.conversion.dry_run import dry_run as run

    return run(request)


def plan(request: "PlanRequest", *, scan: "ScanGuard | bool" = True, progress: Progress | None = None) -> "PlanReport":
    """Choose the rounding of a plain GGUF and write it down; arguments and errors as for `convert`."""
    from qguard_edge.conversion.run import convert_model

    progress = progress or NoProgress()
    return convert_model(request, progress, guard=_guard(scan, request, progress))


def apply(
    plan: str | Path,
    plain: str | Path,
    outfile: str | Path,
    *,
    overwrite: bool = False,
    split: "SplitRule | None" = None,
    progress: Progress | None = None,
) -> "ApplyReport":
    """Write the hardened GGUF of a plan.

    Args:
        plan: what `plan` wrote.
        plain: the file that the plan was made for, or the first shard of it.
        outfile: the hardened GGUF.
        overwrite: replace an existing output.
        split: cut the output into shards (`convert.split.SplitRule`), named after `outfile`; None: one file.
        progress: told about the tensors.

    Raises:
        PlanError: the plan does not belong to the plain file.
        OutputError: the output exists or cannot be written.
    """
    from qguard_edge.conversion.outputs.plan import apply_to

    return apply_to(
        Path(plan), Path(plain), Path(outfile), overwrite=overwrite, progress=progress or NoProgress(), split=split
    )


def scan(request: "ScanRequest", *, progress: Progress | None = None) -> "Scan":
    """Look for marks of tampering in a full-precision model.

    Raises:
        QGuardError: the model cannot be read, or a type cannot be looked at.
    """
    from qguard_edge.scan.run import run_scan

    return run_scan(request, progress or NoProgress())


def verify(request: "VerifyRequest", *, progress: Progress | None = None) -> "Verification":
    """Compare a candidate with its base and give a verdict.

    Raises:
        QGuardError: the two do not belong together, or cannot be run.
    """
    from qguard_edge.verify.verifier import verify as run

    return run(request, progress)


def diff(
    first: str | Path, second: str | Path, *, base: str | Path | None = None, progress: Progress | None = None
) -> "FileDifference":
    """What differs between two GGUFs of the same layout, bit by bit.

    Args:
        first: for instance the plain file.
        second: for instance the hardened file.
        base: the full-precision GGUF both were made from; adds each tensor's alignment.
        progress: told about the tensors.

    Raises:
        FormatError: the files do not hold the same tensors with the same types and shapes.
    """
    from convert.cores import available_cores
    from convert.diff import compare_files

    shown = progress or NoProgress()
    shown.stage("Comparing", 0, "tensors")
    return compare_files(
        Path(first),
        Path(second),
        base=Path(base) if base else None,
        threads=available_cores(),
        progress=lambda _i, _n, name: shown.advance(1, name),
    )


def inspect(file: str | Path) -> "GgufSummary":
    """What a GGUF says about itself; its weights are not read.

    Raises:
        FormatError: it is no sound GGUF.
    """
    from convert.inspection import inspect_gguf

    return inspect_gguf(Path(file))


def compare(
    request: "GgufRequest",
    defenses: Sequence[str | DefenseOptions] | None = None,
    *,
    texts: Sequence[str] | None = None,
    max_tokens: int = 512,
    progress: Progress | None = None,
) -> "list[DefenseRow]":
    """Convert a model with several defenses and measure in llama.cpp how far each result is from full precision.

    Args:
        request: model, type and options; its output name and defense are not used; a seed of None means 0, for all the same.
        defenses: names, names with options (`ortho:width=1`) or the options themselves, in this order; None: all that
            are data-free, and `feedback`.
        texts: to measure on (`read_texts` reads a file of them); None: a short built-in set.
        max_tokens: of each text.
        progress: told about each stage.

    Raises:
        QGuardError: one of its kinds; nothing is left behind.
    """
    from qguard_edge.compare.defenses import compare_defenses
    from qguard_edge.runtimes.fidelity import DEFAULT_TEXT, read_texts

    given = (*DATA_FREE, DEFAULT_DEFENSE) if defenses is None else defenses
    chosen = [parse_defense(defense) if isinstance(defense, str) else defense for defense in given]
    measured = read_texts(DEFAULT_TEXT) if texts is None else texts
    return compare_defenses(request, chosen, measured, max_tokens=max_tokens, progress=progress)


def baseline(request: "BaselineRequest", *, progress: Progress | None = None) -> "Pack":
    """Run a base once and write down what candidates are to be checked against; `write_pack` makes a file of it.

    Raises:
        QGuardError: the base cannot be read or run.
    """
    from qguard_edge.packs.record import record

    return record(request, progress)


def check(request: "CheckRequest", *, progress: Progress | None = None) -> "Verification":
    """Check a candidate, a file or a running server, against a baseline pack (`read_pack`).

    Raises:
        PackError: pack and candidate do not belong together.
        QGuardError: another of its kinds.
    """
    from qguard_edge.packs.check import check as run

    return run(request, progress)


def to_document(
    report: "Document", *, scan: "ScanGuard | None" = None, fail_on: "Severity | str | None" = "dangerous"
) -> dict[str, Any]:
    """A report as JSON values: the document that the command prints with `--json`.

    Args:
        report: of `convert`, `plan`, `scan`, `verify`, `check`, `diff` or `inspect`, or a refusal.
        scan: of a conversion: the guard whose findings belong in its document.
        fail_on: of a scan: the severity from which on its status is `found`; None: never.
    """
    from convert.diff import FileDifference, difference_document
    from convert.inspection import summary_document
    from qguard_edge.conversion.documents import report_document
    from qguard_edge.conversion.report import ConversionReport
    from qguard_edge.report.document import versioned
    from qguard_edge.scan.findings import Severity
    from qguard_edge.scan.guard import RefusedError
    from qguard_edge.scan.report import guard_document, refusal_document, scan_document
    from qguard_edge.scan.results import Scan
    from qguard_edge.verify.results import Verification
    from qguard_edge.verify.results import to_document as verification_document

    match report:
        case ConversionReport():
            return versioned(report_document(report) | (guard_document(scan) if scan else {}))
        case Verification():
            return verification_document(report)
        case Scan():
            return versioned(scan_document(report, fail_on=Severity(fail_on) if fail_on else None))
        case FileDifference():
            return versioned(difference_document(report))
        case RefusedError():
            return versioned(refusal_document(report))
    return versioned(summary_document(report))


def _guard(scan: "ScanGuard | bool", request: "ConversionRequest", progress: Progress) -> "ScanGuard | None":
    from qguard_edge.scan.guard import ScanGuard

    if isinstance(scan, ScanGuard):
        return scan
    return ScanGuard(threads=request.threads, progress=progress) if scan else None
