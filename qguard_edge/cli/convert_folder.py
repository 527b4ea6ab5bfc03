"""`qguard-edge convert --to nf4|fp4|int8|hf`: the part of the command whose output is a folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qguard_edge.cli.console import (
    ConsoleProgress,
    alignment_text,
    check_report_file,
    count_text,
    deliver,
    err,
    out,
    percent,
    print_json,
    size_text,
    table,
)
from qguard_edge.cli.scan_first import guard_document, refusals, show_findings
from quant_grids.errors import UnsupportedError

if TYPE_CHECKING:
    from qguard_edge.folder_plan import DryFolder, FolderRequest
    from qguard_edge.hf_target import FolderReport, MatrixRounding
    from qguard_edge.learned.memory import LearningCost
    from qguard_edge.learned.settings import LearnReport
    from qguard_edge.progress import Progress
    from qguard_edge.rounding import TensorRounding
    from qguard_edge.scan.guard import ScanGuard
    from qguard_edge.verify.gate import Gate
    from qguard_edge.verify.results import Outcome as Verification


def refuse_foreign_flags(to: str, given: Mapping[str, object]) -> None:
    """Refuse options that mean nothing for this kind of output, rather than ignore them.

    Args:
        to: `--to`.
        given: option -> its value; those with a true one were given.

    Raises:
        UnsupportedError: naming the first.
    """
    for flag, value in given.items():
        if value:
            raise UnsupportedError(f"{flag} does not go with --to {to}")


def run_folder(
    request: "FolderRequest",
    verify: str | None,
    look: "Callable[[Progress], ScanGuard] | None",
    *,
    dry_run: bool,
    json_output: bool,
    report_file: Path | None,
    quiet: bool,
) -> None:
    """Carry out the command; `verify` names suites, or is None; `look` makes what scans the model first."""
    if dry_run:
        from qguard_edge.folder_plan import dry_folder

        _show_dry(dry_folder(request), json_output, quiet)
        return
    from qguard_edge.hf_target import convert_to_folder

    check_report_file(report_file)
    with ConsoleProgress(quiet) as progress:
        guard = look(progress) if look else None
        with refusals(json_output):
            report = convert_to_folder(request, progress, _gate(request, verify, progress), guard)
    if guard:
        show_findings(guard, quiet)
    document = {**report_document(report), **guard_document(guard)}
    deliver(document, lambda: _show(report), report_file=report_file, json_output=json_output, quiet=quiet)
    if report.verification and report.verification.verdict.exit_code:
        raise typer.Exit(report.verification.verdict.exit_code)


def _gate(request: "FolderRequest", verify: str | None, progress: Any) -> "Gate | None":
    """What `--verify` asks for, checked before the conversion begins.

    Raises:
        UnsupportedError: a folder for several formats.
    """
    if verify is None:
        return None
    from qguard_edge.verify.gate import make_gate

    kinds = request.check()
    if len(kinds) > 1:
        raise UnsupportedError(
            f"--verify asks about one format, --target all makes a folder for {len(kinds)}; verify the finished folder with "
            "`qguard-edge verify --load-in nf4` and so on"
        )
    names = [name.strip() for name in verify.split(",")]
    return make_gate(names, request.threads, 0, progress, device=request.device, load_in=kinds[0])


def report_document(report: "FolderReport") -> Mapping[str, Any]:
    """The report as JSON values; files by name only, never by path."""
    return {
        **verification_document(report.verification),
        "outfile": report.outfile.name,
        "file_type": report.to.upper(),
        "targets": list(report.kinds),
        "defense": report.defense.name,
        "params": asdict(report.defense),
        "seed": report.seed,
        "reproduced": {kind: _reproduced(_of(report, kind)) for kind in report.kinds},
        "moved_weights": report.moved_weights,
        "kept": {"tensors": report.kept_tensors, "weights": report.kept_weights, "skipped_modules": list(report.skipped)},
        "bytes": {"base": report.base_bytes, "output": report.out_bytes},
        "sha256": dict(report.hashes),
        "seconds": {name: round(value, 3) for name, value in report.seconds.items()},
        "warnings": list(report.warnings),
        "load_check": asdict(report.loaded) if report.loaded else None,
        "learned": asdict(report.learned) if report.learned else None,
        "tensors": [
            {
                **rounding_document(rounding, rounding.kind.upper()),
                "given_up": rounding.given_up,
                "reproduced": _reproduced([rounding]),
            }
            for rounding in report.roundings
        ],
    }


def rounding_document(rounding: "MatrixRounding | TensorRounding", type_name: str) -> dict[str, Any]:
    """What was decided for one tensor, as JSON values."""
    outcome = rounding.outcome
    return {
        "name": rounding.name,
        "type": type_name,
        "weights": rounding.n_weights,
        "flips": outcome.n_changed,
        "share_flipped": outcome.n_changed / rounding.n_weights,
        "alignment_before": 1.0,
        "alignment": outcome.alignment,
        "added_squared_error": outcome.added_error,
    }


def verification_document(found: "Verification | None") -> dict[str, Any]:
    """`status`, and what `--verify` found if it was asked."""
    if found is None:
        return {"status": "ok"}
    from qguard_edge.verify.results import to_document

    return {"status": found.verdict.value if found.verdict.exit_code else "ok", "verification": to_document(found)}


def _of(report: "FolderReport", kind: str) -> "list[MatrixRounding]":
    return [rounding for rounding in report.roundings if rounding.kind == kind]


def _reproduced(roundings: "Sequence[MatrixRounding]") -> float | None:
    """Share of the chosen codes that the unmodified quantizer gave; None where that was not asked."""
    checked = [rounding for rounding in roundings if rounding.reproduced is not None]
    if not checked:
        return None
    return sum(rounding.reproduced or 0 for rounding in checked) / sum(rounding.n_weights for rounding in checked)


def _show(report: "FolderReport") -> None:
    from quant_grids import Outcome

    moved = report.moved_weights is not None
    columns = ["type", ">tensors", ">weights", "protected", ">flipped", ">alignment", ">added error"]
    rows = table(
        f"{report.outfile.name}: {report.to.upper()}, defense {report.defense.name}",
        *columns,
        *([">given up", ">bitsandbytes agrees"] if moved else []),
    )
    for kind in report.kinds:
        mine = _of(report, kind)
        total = Outcome(0, 0.0, 0.0, 0.0)
        for rounding in mine:
            total = total + rounding.outcome
        weights = sum(rounding.n_weights for rounding in mine)
        share = _reproduced(mine)
        given_up = percent(sum(rounding.given_up for rounding in mine) / weights)
        rows.add_row(
            kind.upper(),
            str(len(mine)),
            count_text(weights),
            "yes",
            percent(total.n_changed / weights),
            alignment_text(total.alignment),
            f"{total.added_error:+.0%}",
            *([given_up, "not asked" if share is None else f"{share:.3%}"] if moved else []),
        )
    empty = [""] * (5 if moved else 3)
    rows.add_row("as it was", str(report.kept_tensors), count_text(report.kept_weights), "not rounded", *empty)
    out.print(rows)
    if moved:
        weights = sum(rounding.n_weights for rounding in _of(report, report.kinds[0]))
        out.print(f"{percent((report.moved_weights or 0) / weights)} of the weights of the linear modules were moved")
    if report.learned:
        show_learned(report.learned)
    for warning in report.warnings:
        err.print(f"[yellow]warning:[/] {warning}", highlight=False)
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    sizes = f"base {size_text(report.base_bytes)} -> {size_text(report.out_bytes)}"
    out.print(f"{sizes}; {times}", highlight=False, soft_wrap=True)
    out.print(f"seed {report.seed} (recorded in the folder; --seed repeats it)", highlight=False)
    if report.verification:
        from qguard_edge.cli.verify import show_outcome

        show_outcome(report.verification)
    if report.loaded:
        said = f"{report.loaded.prompt!r} -> {report.loaded.text!r}"
        out.print(f"transformers loads it: {said}", highlight=False, markup=False)
    out.print(f"wrote {report.outfile}", highlight=False, markup=False, soft_wrap=True)


def show_learned(learned: "LearnReport") -> None:
    """What learning did, in one line."""
    trend = f"{learned.losses[0][1]:.4f} -> {learned.losses[-1][1]:.4f}, " if learned.losses else ""
    out.print(
        f"learned on {learned.samples} texts ({learned.calibration_source}): {trend}alignment "
        f"{learned.alignment_learned:.2f} from learning alone, {learned.alignment:.2f} with the constraint's flips",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def learning_text(cost: "LearningCost | None") -> str:
    """What a learned defense will take, for the last line of `--dry-run`; nothing for the others."""
    if cost is None:
        return ""
    time = f" and about {cost.seconds / 60:.0f} min" if cost.seconds is not None else ""
    return f"; learning takes about {size_text(cost.memory_bytes)}{time}"


def _show_dry(plan: "DryFolder", json_output: bool, quiet: bool) -> None:
    if json_output:
        print_json(asdict(plan) | {"status": "ok", "outfile": plan.outfile.name})
        return
    if not quiet:
        rows = table("What would be written", "tensor", "shape", "from", "to", ">size", "protection")
        for tensor in plan.tensors:
            shape = " x ".join(map(str, tensor.shape))
            size = size_text(tensor.n_bytes)
            rows.add_row(tensor.name, shape, tensor.source_type, tensor.target_type, size, tensor.protection)
        out.print(rows)
        for warning in plan.warnings:
            err.print(f"[yellow]warning:[/] {warning}", highlight=False)
    out.print(
        f"{size_text(plan.base_bytes)} -> {size_text(plan.out_bytes)}{learning_text(plan.learning)}; would write "
        f"{plan.outfile.name}; nothing was written",
        highlight=False,
    )
