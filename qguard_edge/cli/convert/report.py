"""What `qguard-edge convert` says of a GGUF: the JSON document, the summary table, the dry run."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qguard_edge.cli.console import alignment_text, count_text, err, out, percent, print_json, size_text, table
from qguard_edge.cli.convert.folder_report import learning_text, rounding_document, show_learned, verification_document

if TYPE_CHECKING:
    from qguard_edge.conversion.dry_run import DryRun
    from qguard_edge.conversion.report import ConvertReport


def report_document(report: "ConvertReport") -> dict[str, Any]:
    """The report as JSON values; files by name only, never by path."""
    return {
        **verification_document(report.verification),
        "outfile": report.outfile.name,
        "reference": report.reference.name if report.reference else None,
        "file_type": report.file_type.name,
        "defense": report.defense.name if report.defense else None,
        "params": asdict(report.defense) if report.defense else None,
        "seed": report.seed,
        "protected_share": report.coverage.protected_share if report.coverage else None,
        "unprotected": [tensor.name for tensor in report.coverage.unprotected] if report.coverage else [],
        "bytes": {"base": report.base_bytes, "output": report.out_bytes},
        "sha256": dict(report.hashes),
        "seconds": {name: round(value, 3) for name, value in report.seconds.items()},
        "fallbacks": [asdict(fallback) for fallback in report.quantized.fallbacks] if report.quantized else [],
        "warnings": list(report.warnings),
        "load_check": asdict(report.loaded) if report.loaded else None,
        "learned": asdict(report.learned) if report.learned else None,
        "tensors": [rounding_document(rounding, rounding.ggml_type.name) for rounding in report.roundings],
    }


def show_report(report: "ConvertReport") -> None:
    """The summary table, warnings, times and names of what was written."""
    from qguard_edge.conversion.metadata import total_outcome
    from quant_grids import Outcome

    if report.coverage is not None:
        rows = table(
            f"{report.outfile.name}: {report.file_type.name}, defense {report.defense.name if report.defense else '-'}",
            "type", ">tensors", ">weights", "protected", ">flipped", ">alignment", ">added error",
        )  # fmt: skip
        by_type: dict[str, list[Any]] = {}
        for rounding in report.roundings:
            by_type.setdefault(rounding.ggml_type.name, []).append(rounding)
        for name, group in sorted(by_type.items()):
            _add_row(rows, name, len(group), sum(r.n_weights for r in group), total_outcome(group))
        for label, tensors in (("no", report.coverage.unprotected), ("not rounded", report.coverage.untouched)):
            kinds = sorted({tensor.ggml_type.name for tensor in tensors})
            if tensors:
                weights = sum(tensor.n_weights for tensor in tensors)
                rows.add_row(", ".join(kinds), str(len(tensors)), count_text(weights), label, "", "", "")
        total = total_outcome(report.roundings) if report.roundings else Outcome(0, 0.0, 0.0, 0.0)
        rows.add_section()
        _add_row(rows, "all", len(report.roundings), sum(r.n_weights for r in report.roundings), total)
        out.print(rows)
    _show_fallbacks(report.quantized.fallbacks if report.quantized else ())
    for warning in report.warnings:
        err.print(f"[yellow]warning:[/] {warning}", highlight=False)
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    sizes = f"base {size_text(report.base_bytes)} -> {size_text(report.out_bytes)}"
    out.print(f"{sizes}; {times}", highlight=False, soft_wrap=True)
    if report.seed is not None:
        out.print(f"seed {report.seed} (recorded in the file; --seed repeats it)", highlight=False)
    if report.verification:
        from qguard_edge.cli.verify import show_outcome

        show_outcome(report.verification)
    if report.learned:
        show_learned(report.learned)
    if report.loaded:
        said = f"{report.loaded.prompt!r} -> {report.loaded.text!r}"
        out.print(f"llama.cpp loads it: {said}", highlight=False, markup=False)
    out.print(f"wrote {report.outfile}", highlight=False, markup=False, soft_wrap=True)
    if report.reference:
        out.print(f"kept  {report.reference}", highlight=False, markup=False, soft_wrap=True)


def _add_row(rows: Any, name: str, count: int, weights: int, outcome: Any) -> None:
    rows.add_row(
        name,
        str(count),
        count_text(weights),
        "yes",
        percent(outcome.n_changed / weights) if weights else "-",
        alignment_text(outcome.alignment) if weights else "-",
        f"{outcome.added_error:+.0%}" if weights else "-",
    )


def _show_fallbacks(fallbacks: Any) -> None:
    """Loudly: these tensors are not stored as the type that was asked for."""
    if not fallbacks:
        return
    groups: dict[tuple[str, str, int], list[str]] = {}
    for fallback in fallbacks:
        groups.setdefault((fallback.wanted, fallback.got, fallback.columns), []).append(fallback.tensor)
    rows = table(
        f"{len(fallbacks)} tensors fell back to another type (their row length is not a multiple of the block)",
        "wanted", "got", ">row length", ">tensors", "for example",
    )  # fmt: skip
    for (wanted, got, columns), names in sorted(groups.items()):
        rows.add_row(wanted, got, str(columns), str(len(names)), names[0])
    out.print(rows)


def show_dry_run(plan: "DryRun", json_output: bool, quiet: bool) -> None:
    """What would be written, per tensor."""
    if json_output:
        document = asdict(plan) | {"status": "ok", "outfile": plan.outfile.name}
        print_json(document)
        return
    if not quiet:
        rows = table("What llama.cpp would write", "tensor", "shape", "from", "to", ">size", "protection", "fallback")
        for tensor in plan.tensors:
            fell = f"wanted {tensor.fallback.wanted}" if tensor.fallback else ""
            shape = " x ".join(map(str, tensor.shape))
            rows.add_row(
                tensor.name,
                shape,
                tensor.source_type,
                tensor.target_type,
                size_text(tensor.n_bytes),
                tensor.protection,
                fell,
            )
        out.print(rows)
        _show_fallbacks([tensor.fallback for tensor in plan.tensors if tensor.fallback])
        for warning in plan.warnings:
            err.print(f"[yellow]warning:[/] {warning}", highlight=False)
    out.print(
        f"{size_text(plan.base_bytes)} -> {size_text(plan.out_bytes)}, memory about {size_text(plan.memory_bytes)}"
        f"{learning_text(plan.learning)}; would write {plan.outfile.name}; nothing was written",
        highlight=False,
    )
