"""A conversion's report as tables for people, and the plan of `--dry-run`."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.sizes import size_text
from qguard_edge.cli.console import (
    alignment_text,
    count_text,
    duration_text,
    err,
    out,
    percent,
    print_json,
    styled,
    table,
)

if TYPE_CHECKING:
    from convert.quantizer import Fallback
    from qguard_edge.conversion.dry_run import DryRun, DryTensor
    from qguard_edge.conversion.feedback_cost import FeedbackCost
    from qguard_edge.conversion.report import ConversionReport, FolderReport, GgufReport, MovedGgufReport
    from qguard_edge.learned.memory import LearningCost
    from qguard_edge.learned.settings import LearnReport
    from quant_grids import Outcome


def show_report(report: "ConversionReport", model: str, *, verbose: bool = False) -> None:
    """What matters first: how near to full precision, how large, what is protected; then what was written, and what to do next.

    Args:
        report: of the conversion.
        model: that was converted, as the user named it.
        verbose: also the table of the output's kind, what the rounding was fitted to, and times.
    """
    from qguard_edge.conversion.report import FolderReport, GgufReport, MovedGgufReport

    if isinstance(report, GgufReport):
        _show_lead(report)
    if verbose or not isinstance(report, GgufReport):
        _show_details(report)
    if isinstance(report, GgufReport | MovedGgufReport):
        _show_fallbacks(report.quantized.fallbacks if isinstance(report, GgufReport) and report.quantized else ())
    for warning in report.warnings:
        err.print(styled("[yellow]warning:[/] {warning}", warning=warning), highlight=False)
    if report.seed is not None:
        out.print(f"seed {report.seed} (recorded in the output; --seed repeats it)", highlight=False)
    if report.verification:
        from qguard_edge.cli.verification_tables import show_verification

        show_verification(report.verification)
    if report.loaded:
        runtime = "transformers" if isinstance(report, FolderReport) else "llama.cpp"
        said = f"{report.loaded.prompt!r} -> {report.loaded.text!r}"
        out.print(f"{runtime} loads it: {said}", highlight=False, markup=False)
    _show_written(report, model)


def _show_written(report: "ConversionReport", model: str) -> None:
    """Names of what was written, and the command that comes next."""
    from qguard_edge.conversion.report import GgufReport

    out.print(f"wrote {report.outfile}", highlight=False, markup=False, soft_wrap=True)
    if not isinstance(report, GgufReport):
        return
    if report.plain:
        out.print(f"kept  {report.plain}", highlight=False, markup=False, soft_wrap=True)
    if report.mmproj:
        halves = f", {' and '.join(report.loaded.halves)} half" if report.loaded and report.loaded.halves else ""
        out.print(f"wrote {report.mmproj} (beside it{halves}, not hardened)", highlight=False, markup=False, soft_wrap=True)
    if report.roundings and not report.verification and Path(model).exists():
        words = ["qguard-edge", "verify", str(report.outfile), "--base", model]
        words += ["--plain", str(report.plain)] if report.plain else []
        out.print(f"next: {shlex.join(words)}", highlight=False, markup=False, soft_wrap=True)


def _show_lead(report: "GgufReport") -> None:
    """Whether the file is nearer to full precision than plain rounding, its real size, and what is protected."""
    if measured := report.beside_plain:
        why = _why_further(report) if measured.factor_interval[1] < 1 else ""
        out.print(styled("[bold]{sentence}[/]{why}", sentence=_capital(measured.sentence), why=why), highlight=False)
    bits = f", {report.bits_per_weight:.2f} bits per weight" if report.bits_per_weight else ""
    sizes = f"{size_text(report.out_bytes)}{bits} (base {size_text(report.base_bytes)})"
    if report.coverage is None:
        out.print(f"{report.file_type.name}: {sizes}", highlight=False)
        return
    left = report.coverage.unprotected
    guarded = f"{_defense_name(report)} chose the rounding of {len(report.roundings)} tensors"
    share = f"{percent(report.coverage.protected_share)} of the rounded weights are protected"
    rest = f"; not reached: {', '.join(tensor.name for tensor in left[:3])}{' ...' if len(left) > 3 else ''}" if left else ""
    out.print(f"{report.file_type.name}: {sizes}; {guarded}, {share}{rest}", highlight=False)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _why_further(report: "GgufReport") -> str:
    """Why a file may be further from full precision than plain rounding, and what helps."""
    if report.activations:
        return (
            ": the text that the rounding was fitted to is unlike this one, or the weights had been rounded before; --calib FILE "
            "with text of the model's own world usually mends it"
        )
    return f": that is the price of --defense {_defense_name(report)}; the default, feedback, costs less"


def _show_details(report: "ConversionReport") -> None:
    """The table of the output's kind, what was learned and seen, sizes and times."""
    from qguard_edge.conversion.report import FolderReport, GgufReport, MovedGgufReport

    match report:
        case GgufReport():
            _show_gguf(report)
        case FolderReport():
            _show_folder(report)
        case MovedGgufReport():
            _show_moved(report)
    if report.learned:
        show_learned(report.learned)
    if report.activations:
        _show_activations(report)
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    sizes = f"base {size_text(report.base_bytes)} -> {size_text(report.out_bytes)}"
    out.print(f"{sizes}; {times}", highlight=False, soft_wrap=True)


def _defense_name(report: "ConversionReport") -> str:
    return report.defense.name if report.defense else "-"


def _outcome_cells(weights: int, outcome: "Outcome") -> list[str]:
    """Share flipped and alignment; dashes where there is no weight."""
    if not weights:
        return ["-"] * 2
    return [percent(outcome.n_changed / weights), alignment_text(outcome.alignment)]


def _show_gguf(report: "GgufReport") -> None:
    from qguard_edge.rounding.gguf import total_outcome

    if report.coverage is not None:
        rows = table(
            f"{report.outfile.name}: {report.file_type.name}, defense {_defense_name(report)}",
            "type", ">tensors", ">weights", "protected", ">flipped", ">alignment",
        )  # fmt: skip

        def add(name: str, group: Sequence[Any]) -> None:
            weights = sum(rounding.n_weights for rounding in group)
            cells = _outcome_cells(weights, total_outcome(group))
            rows.add_row(name, str(len(group)), count_text(weights), "yes", *cells)

        for name in sorted({rounding.ggml_type.name for rounding in report.roundings}):
            add(name, [rounding for rounding in report.roundings if rounding.ggml_type.name == name])
        for label, tensors in (("no", report.coverage.unprotected), ("not rounded", report.coverage.untouched)):
            kinds = sorted({tensor.ggml_type.name for tensor in tensors})
            if tensors:
                weights = sum(tensor.n_weights for tensor in tensors)
                rows.add_row(", ".join(kinds), str(len(tensors)), count_text(weights), label, "", "")
        rows.add_section()
        add("all", report.roundings)
        out.print(rows)


def _show_fallbacks(fallbacks: "Sequence[Fallback]") -> None:
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


def _show_folder(report: "FolderReport") -> None:
    from qguard_edge.conversion.documents import of_kind, reproduced
    from qguard_edge.rounding.gguf import total_outcome

    moved = report.moved_weights is not None
    rows = table(
        f"{report.outfile.name}: {report.to.upper()}, defense {_defense_name(report)}",
        "type", ">tensors", ">weights", "protected", ">flipped", ">alignment",
        *([">given up", ">bitsandbytes agrees"] if moved else []),
    )  # fmt: skip
    for kind in report.kinds:
        mine = of_kind(report, kind)
        weights, share = sum(rounding.n_weights for rounding in mine), reproduced(mine)
        given_up = percent(sum(rounding.given_up for rounding in mine) / weights)
        cells = _outcome_cells(weights, total_outcome(mine))
        more = [given_up, "not checked" if share is None else f"{share:.3%}"] if moved else []
        rows.add_row(kind.upper(), str(len(mine)), count_text(weights), "yes", *cells, *more)
    empty = [""] * (4 if moved else 2)
    rows.add_row("as it was", str(report.kept_tensors), count_text(report.kept_weights), "not rounded", *empty)
    out.print(rows)
    if moved:
        weights = sum(rounding.n_weights for rounding in of_kind(report, report.kinds[0]))
        out.print(f"{percent((report.moved_weights or 0) / weights)} of the weights of the linear modules were moved")


def _show_moved(report: "MovedGgufReport") -> None:
    from qguard_edge.conversion.documents import codes_as_chosen, flips_reached
    from qguard_edge.rounding.gguf import total_outcome

    rows = table(
        f"{report.outfile.name}: full precision, moved for {report.file_type.name}, defense {_defense_name(report)}; what "
        "llama.cpp then makes of it",
        "type", ">tensors", ">weights", ">moved", ">flips reached", ">codes as chosen", ">alignment",
    )  # fmt: skip
    for name in sorted({tensor.ggml_type.name for tensor in report.tensors}):
        mine = [tensor for tensor in report.tensors if tensor.ggml_type.name == name]
        weights = sum(tensor.n_weights for tensor in mine)
        moved = percent(sum(tensor.n_moved for tensor in mine) / weights)
        reached = [f"{flips_reached(mine):.2%}", f"{codes_as_chosen(mine):.2%}"]
        cells = _outcome_cells(weights, total_outcome(mine))[1:]
        rows.add_row(name, str(len(mine)), count_text(weights), moved, *reached, *cells)
    out.print(rows)


def _show_activations(report: "ConversionReport") -> None:
    """What the rounding was fitted to, and how much of it cannot be known without the seed."""
    seen, learned = report.activations, report.learned
    assert seen is not None
    unseen = f", {len(seen.unseen)} matrices without known inputs" if seen.unseen else ""
    least = "at least " if learned and learned.moved else ""
    out.print(
        f"fitted to {seen.tokens} tokens of text ({seen.calibration_source}){unseen}; {least}{count_text(report.entropy_bits)} "
        "bits of the rounding are random",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def show_learned(learned: "LearnReport") -> None:
    """What learning did, in one line."""
    trend = f"{learned.losses[0][1]:.4f} -> {learned.losses[-1][1]:.4f}, " if learned.losses else ""
    moved = f"{count_text(learned.moved)} drawn codes moved, " if learned.moved else ""
    out.print(
        f"learned on {learned.samples} texts ({learned.calibration_source}): {trend}{moved}alignment "
        f"{learned.alignment_learned:.2f} from learning alone, {learned.alignment:.2f} with the constraint",
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


def _show_prediction(cost: "FeedbackCost") -> None:
    """How long each stage will take."""
    rows = table("Predicted time", "stage", ">time")
    for stage, seconds in cost.seconds.items():
        rows.add_row(stage, duration_text(seconds))
    out.print(rows)
    passes = f" in {cost.passes} passes over the text" if cost.passes > 1 else ""
    out.print(f"measured on this machine, threads: {cost.threads}, as if it did nothing else", highlight=False)
    out.print(f"activations keep {size_text(cost.disk_bytes)} on disk beside the output{passes}", highlight=False)


def show_dry_run(plan: "DryRun", json_output: bool, quiet: bool, verbose: bool = False) -> None:
    """What would be written: the conclusion first; every tensor with `verbose`."""
    if json_output:
        print_json(asdict(plan) | {"status": "ok", "outfile": plan.outfile.name})
        return
    takes = f"; takes about {duration_text(plan.prediction.total)}" if plan.prediction else learning_text(plan.learning)
    out.print(
        f"{size_text(plan.base_bytes)} -> {size_text(plan.out_bytes)}, memory about {size_text(plan.memory_bytes)}"
        f"{takes}; would write {plan.outfile.name}; nothing was written",
        highlight=False,
    )
    if quiet:
        return
    rows = table("What would be written", "from", "to", "protection", ">tensors", ">weights", ">size")
    groups: dict[tuple[str, str, str], list[DryTensor]] = {}
    for tensor in plan.tensors:
        groups.setdefault((tensor.source_type, tensor.target_type, tensor.protection), []).append(tensor)
    for kinds, tensors in sorted(groups.items()):
        weights = count_text(sum(prod(tensor.shape) for tensor in tensors))
        rows.add_row(*kinds, str(len(tensors)), weights, size_text(sum(tensor.n_bytes for tensor in tensors)))
    out.print(rows)
    _show_fallbacks([tensor.fallback for tensor in plan.tensors if tensor.fallback])
    if plan.prediction:
        _show_prediction(plan.prediction)
    for warning in plan.warnings:
        err.print(styled("[yellow]warning:[/] {warning}", warning=warning), highlight=False)
    if not verbose:
        out.print("-v lists every tensor", style="dim", highlight=False)
        return
    rows = table("Every tensor", "tensor", "shape", "from", "to", ">size", "protection", "fallback")
    for tensor in plan.tensors:
        fell = f"wanted {tensor.fallback.wanted}" if tensor.fallback else ""
        shape, size = " x ".join(map(str, tensor.shape)), size_text(tensor.n_bytes)
        rows.add_row(tensor.name, shape, tensor.source_type, tensor.target_type, size, tensor.protection, fell)
    out.print(rows)
