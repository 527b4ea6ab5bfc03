"""`qguard-edge convert --to gguf`: a full-precision GGUF that llama-quantize itself rounds to the chosen codes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qguard_edge.cli.console import (
    ConsoleProgress,
    alignment_text,
    check_report_file,
    count_text,
    deliver,
    err,
    out,
    percent,
    table,
)
from qguard_edge.cli.convert.scan_first import guard_document, refusals, show_findings

if TYPE_CHECKING:
    from qguard_edge.conversion.report import MovedReport
    from qguard_edge.conversion.request import ConvertRequest
    from qguard_edge.progress import Progress
    from qguard_edge.rounding.gguf_moved import MovedTensor
    from qguard_edge.scan.guard import ScanGuard


def run_moved(
    request: "ConvertRequest",
    look: "Callable[[Progress], ScanGuard] | None",
    *,
    json_output: bool,
    report_file: Path | None,
    quiet: bool,
) -> None:
    """Carry out the command; `look` makes what scans the model first."""
    from qguard_edge.conversion.outputs.moved_gguf import convert_to_moved_base

    check_report_file(report_file)
    with ConsoleProgress(quiet) as progress:
        guard = look(progress) if look else None
        with refusals(json_output):
            report = convert_to_moved_base(request, progress, guard)
    if guard:
        show_findings(guard, quiet)
    document = {**report_document(report), **guard_document(guard)}
    deliver(document, lambda: _show(report), report_file=report_file, json_output=json_output, quiet=quiet)


def report_document(report: "MovedReport") -> Mapping[str, Any]:
    """The report as JSON values; files by name only, never by path."""
    return {
        "status": "ok",
        "outfile": report.outfile.name,
        "target": report.request.options.file_type.name,
        "defense": report.request.defense.name,
        "params": asdict(report.request.defense),
        "seed": report.seed,
        "reproduced": _reproduced(report.tensors),
        "flips_reached": _reached(report.tensors),
        "sha256": report.hashes,
        "seconds": {name: round(value, 3) for name, value in report.seconds.items()},
        "warnings": list(report.warnings),
        "load_check": asdict(report.loaded) if report.loaded else None,
        "tensors": [
            {
                "name": tensor.name,
                "type": tensor.ggml_type.name,
                "weights": tensor.n_weights,
                "flips_chosen": tensor.n_chosen,
                "weights_moved": tensor.n_moved,
                "flips_reached": tensor.reached,
                "reproduced": tensor.codes / tensor.n_weights,
                "alignment_chosen": rounding.outcome.alignment,
                "alignment": tensor.outcome.alignment,
                "added_squared_error": tensor.outcome.added_error,
            }
            for tensor, rounding in zip(report.tensors, report.chosen, strict=True)
        ],
    }


def _reproduced(tensors: "Sequence[MovedTensor]") -> float:
    """Share of all codes that llama.cpp gives as chosen."""
    weights = sum(tensor.n_weights for tensor in tensors)
    return sum(tensor.codes for tensor in tensors) / weights if weights else 1.0


def _reached(tensors: "Sequence[MovedTensor]") -> float:
    """Share of the moved weights that have their new code."""
    moved = sum(tensor.n_moved for tensor in tensors)
    return sum(tensor.reached for tensor in tensors) / moved if moved else 1.0


def _show(report: "MovedReport") -> None:
    from quant_grids import Outcome

    rows = table(
        f"{report.outfile.name}: full precision, moved for {report.request.options.file_type.name}, "
        f"defense {report.request.defense.name}; what llama.cpp then makes of it",
        "type", ">tensors", ">weights", ">moved", ">flips reached", ">codes as chosen", ">alignment", ">added error",
    )  # fmt: skip
    for name in sorted({tensor.ggml_type.name for tensor in report.tensors}):
        mine = [tensor for tensor in report.tensors if tensor.ggml_type.name == name]
        weights = sum(tensor.n_weights for tensor in mine)
        total = Outcome(0, 0.0, 0.0, 0.0)
        for tensor in mine:
            total = total + tensor.outcome
        rows.add_row(
            name,
            str(len(mine)),
            count_text(weights),
            percent(sum(tensor.n_moved for tensor in mine) / weights),
            f"{_reached(mine):.2%}",
            f"{_reproduced(mine):.2%}",
            alignment_text(total.alignment),
            f"{total.added_error:+.0%}",
        )
    out.print(rows)
    for warning in report.warnings:
        err.print(f"[yellow]warning:[/] {warning}", highlight=False)
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    out.print(times, highlight=False, soft_wrap=True)
    out.print(f"seed {report.seed} (--seed repeats it)", highlight=False)
    if report.loaded:
        out.print(f"llama.cpp loads it: {report.loaded.prompt!r} -> {report.loaded.text!r}", highlight=False, markup=False)
    out.print(f"wrote {report.outfile}", highlight=False, markup=False, soft_wrap=True)
