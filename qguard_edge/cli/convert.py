"""`qguard-edge convert`: the main job."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from qguard_edge.cli.calibration_flags import CalibFlag, CalibSamplesFlag, CalibSeqlenFlag, MaxMemoryFlag
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
from qguard_edge.cli.convert_folder import (
    learning_text,
    refuse_foreign_flags,
    run_folder,
    show_learned,
    verification_document,
)
from qguard_edge.cli.convert_moved import run_moved
from qguard_edge.cli.defense_flags import options_from, with_defense_flags
from qguard_edge.cli.scan_first import (
    check_scan_flags,
    guard_document,
    make_guard,
    refusals,
    scan_folder,
    show_findings,
)
from qguard_edge.defenses.options import DEFAULT_DEFENSE, QVecOptions
from quant_grids.errors import UnsupportedError

if TYPE_CHECKING:
    from qguard_edge.dry_run import DryRun
    from qguard_edge.pipeline import ConvertReport, ConvertRequest

QUANTIZE_PANEL = "Options that llama-quantize knows too"

SCAN_PANEL = "Look before converting (see `qguard-edge scan`)"

BNB_PANEL = "Options of --to nf4, fp4, int8, hf"

HELP = """Convert MODEL to a hardened GGUF, or to a hardened folder for bitsandbytes.

MODEL is a Hugging Face folder, a hub id (OWNER/NAME), or a .gguf file in F32, F16 or BF16 (the first shard of a split one).
`--to nf4`, `fp4` and `int8` write a pre-quantized Hugging Face folder for servers; `--to hf` writes a full-precision folder
that bitsandbytes' own `load_in_4bit` and `load_in_8bit` round to the hardened codes, and `--to gguf --target TYPE` a
full-precision GGUF whose quantization by llama.cpp is hardened.

Examples:

    qguard-edge convert ./SmolLM2-135M-Instruct --to q4_k

    qguard-edge convert model-bf16.gguf --to q6_k -o model-{ftype}.gguf --keep-reference

    qguard-edge convert ./SmolLM2-135M-Instruct --to q4_0 --defense quantguard --calib chats.jsonl

    qguard-edge convert ./SmolLM2-135M-Instruct --to q4_k --verify

    qguard-edge convert Qwen/Qwen2.5-0.5B-Instruct --to q4_k_m --imatrix imatrix.gguf --dry-run

    qguard-edge convert ./SmolLM2-135M-Instruct --to nf4 --bnb-double-quant -o SmolLM2-135M-NF4

    qguard-edge convert ./SmolLM2-135M-Instruct --to hf --target all

    qguard-edge convert model-bf16.gguf --to gguf --target q4_0
"""


class ConvertCommand(TyperCommand):
    """Lets `--verify` stand alone: typer has no options whose value may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `click.Command.parse_args`."""
        return super().parse_args(ctx, with_default_suites(args))


def with_default_suites(arguments: Sequence[str]) -> list[str]:
    """Arguments in which a `--verify` that no list of names follows asks for all suites."""
    given = list(arguments)
    for i, argument in enumerate(given):
        following = given[i + 1] if i + 1 < len(given) else ""
        if argument == "--verify" and not (re.fullmatch(r"[a-z]+(,[a-z]+)*", following) and not Path(following).exists()):
            given[i] = "--verify=all"
    return given


@with_defense_flags
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or .gguf file.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="TYPE",
            help="llama.cpp file type, any case: q4_k (= Q4_K_M), q8_0, ... f16; or nf4, fp4, int8, hf, gguf.",
        ),
    ],
    outfile: Annotated[
        str | None,
        typer.Option("-o", "--outfile", help="Output; {ftype} is replaced. Default: NAME-FTYPE.gguf in this folder."),
    ] = None,
    defense: Annotated[str, typer.Option(help="Rounding defense, see `qguard-edge defenses`.")] = DEFAULT_DEFENSE,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Repeat a conversion. Default: fresh for each, recorded in the file.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    calib: CalibFlag = None,
    calib_samples: CalibSamplesFlag = None,
    calib_seqlen: CalibSeqlenFlag = 256,
    max_memory: MaxMemoryFlag = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    base_type: Annotated[
        str | None,
        typer.Option(help="Precision of the base made from a folder: f32, f16 or bf16. Default: the model's own."),
    ] = None,
    pre: Annotated[str | None, typer.Option(help="Force llama.cpp's pre-tokenizer name.")] = None,
    converter: Annotated[
        Path | None,
        typer.Option(help="llama.cpp's convert_hf_to_gguf.py, for other architectures. Default: looks in LLAMA_CPP_ROOT."),
    ] = None,
    keep_reference: Annotated[
        bool, typer.Option("--keep-reference", help="Also keep llama.cpp's own file, as NAME.reference.gguf.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    allow_unprotected: Annotated[
        bool, typer.Option("--allow-unprotected", help="Accept tensors whose type no defense can reach.")
    ] = False,
    no_load_check: Annotated[
        bool, typer.Option("--no-load-check", help="Do not load the result before it gets its name.")
    ] = False,
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="[SUITES]",
            help="Verify the result before it gets its name: injection, refusal, code (separated by commas), drift or all; "
            "alone: all. With a failing verdict the file is written as NAME.rejected.gguf and the exit code is 1.",
        ),
    ] = None,
    no_scan: Annotated[
        bool, typer.Option("--no-scan", help="Do not scan the model first.", rich_help_panel=SCAN_PANEL)
    ] = False,
    accept_findings: Annotated[
        bool,
        typer.Option("--accept-findings", help="Convert even if the scan calls it dangerous.", rich_help_panel=SCAN_PANEL),
    ] = False,
    keep_flagged_f16: Annotated[
        bool,
        typer.Option(
            "--keep-flagged-f16",
            help="Keep tensors that the scan calls dangerous in F16 or BF16; needs --verify.",
            rich_help_panel=SCAN_PANEL,
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan per tensor, sizes and memory; write nothing.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Also write the JSON document to this file.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
    imatrix: Annotated[
        Path | None, typer.Option(help="Importance matrix, GGUF or legacy .dat.", rich_help_panel=QUANTIZE_PANEL)
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(metavar="RE=TYPE", help="Type of the tensors that match; repeatable.", rich_help_panel=QUANTIZE_PANEL),
    ] = None,
    output_tensor_type: Annotated[
        str | None, typer.Option(help="Type of output.weight.", rich_help_panel=QUANTIZE_PANEL)
    ] = None,
    token_embedding_type: Annotated[
        str | None, typer.Option(help="Type of the token embeddings.", rich_help_panel=QUANTIZE_PANEL)
    ] = None,
    pure: Annotated[
        bool, typer.Option("--pure", help="No mixture: every tensor gets the same type.", rich_help_panel=QUANTIZE_PANEL)
    ] = False,
    leave_output_tensor: Annotated[
        bool, typer.Option("--leave-output-tensor", help="Keep output.weight as it is.", rich_help_panel=QUANTIZE_PANEL)
    ] = False,
    override_kv: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=TYPE:VALUE", help="Override metadata; repeatable.", rich_help_panel=QUANTIZE_PANEL),
    ] = None,
    allow_requantize: Annotated[
        bool,
        typer.Option("--allow-requantize", help="Accept an already quantized input.", rich_help_panel=QUANTIZE_PANEL),
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0 means all cores.", rich_help_panel=QUANTIZE_PANEL)] = 0,
    qvec_text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Search lambda on these texts (UTF-8, separated by empty lines) instead of --qvec-strength.",
            rich_help_panel="Options of --defense qvec",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="With --to hf: nf4, fp4, int8 or all [default: all]; with --to gguf: a llama.cpp type.",
            rich_help_panel=BNB_PANEL,
            show_default=False,
        ),
    ] = None,
    bnb_double_quant: Annotated[
        bool, typer.Option("--bnb-double-quant", help="Compress the scales of nf4 and fp4.", rich_help_panel=BNB_PANEL)
    ] = False,
    bnb_skip: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Module to leave in its precision; repeatable.", rich_help_panel=BNB_PANEL),
    ] = None,
    **flags: Any,
) -> None:
    """Replaced by HELP when the command is registered."""
    chosen = options_from(defense, flags)
    _check_qvec_text(defense, qvec_text, flags)
    check_scan_flags(no_scan, accept_findings, keep_flagged_f16, verify)

    from convert.folder_targets import is_folder_target

    folder_only = {"--target": target, "--bnb-double-quant": bnb_double_quant, "--bnb-skip": bnb_skip}
    if is_folder_target(to):
        gguf_only = {
            "--pre": pre,
            "--converter": converter,
            "--keep-reference": keep_reference,
            "--allow-unprotected": allow_unprotected,
            "--imatrix": imatrix,
            "--tensor-type": tensor_type,
            "--output-tensor-type": output_tensor_type,
            "--token-embedding-type": token_embedding_type,
            "--pure": pure,
            "--leave-output-tensor": leave_output_tensor,
            "--override-kv": override_kv,
            "--allow-requantize": allow_requantize,
            "--keep-flagged-f16": keep_flagged_f16,
            "--qvec-text": qvec_text,
        }
        refuse_foreign_flags(to, gguf_only)
        from qguard_edge.calibration import CalibrationOptions
        from qguard_edge.folder_plan import FolderRequest
        from qguard_edge.learned.memory import parse_size

        folder = FolderRequest(
            model=model,
            to=to.strip().lower(),
            defense=chosen,
            target=target,
            outfile=outfile,
            revision=revision,
            base_type=base_type,
            device=device,
            seed=seed,
            threads=threads,
            skip=tuple(bnb_skip or ()),
            double_quant=bnb_double_quant,
            overwrite=overwrite,
            check_loads=not no_load_check,
            calibration=CalibrationOptions(calib, calib_samples, calib_seqlen),
            max_memory=parse_size(max_memory) if max_memory else None,
        )
        if not (no_scan or dry_run):
            scan_folder(folder, accept_findings, json_output=json_output, quiet=quiet)
        run_folder(folder, verify, dry_run=dry_run, json_output=json_output, report_file=report_file, quiet=quiet)
        return
    moved = to.strip().lower() == "gguf"
    if moved:
        folder_only.pop("--target")
        unused: dict[str, object] = {
            "--verify": verify,
            "--keep-reference": keep_reference,
            "--dry-run": dry_run,
            "--qvec-text": qvec_text,
        }
        unused["--keep-flagged-f16"] = keep_flagged_f16
        refuse_foreign_flags(to, unused)
        if target is None:
            raise UnsupportedError("--to gguf needs --target TYPE: the llama.cpp type that the base is to be quantized to")
    refuse_foreign_flags(to, folder_only)

    from convert.ftypes import parse_file_type
    from convert.quantizer import QuantizeOptions, parse_tensor_type

    options = QuantizeOptions(
        file_type=parse_file_type(target if moved and target else to),
        threads=threads,
        imatrix=imatrix,
        tensor_types=tuple(parse_tensor_type(text) for text in tensor_type or ()),
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        pure=pure,
        leave_output_tensor=leave_output_tensor,
        override_kv=tuple(override_kv or ()),
        allow_requantize=allow_requantize,
    )
    options.check()

    from qguard_edge.calibration import CalibrationOptions
    from qguard_edge.learned.memory import parse_size
    from qguard_edge.pipeline import ConvertRequest, convert_model

    request = ConvertRequest(
        model=model,
        options=options,
        defense=chosen,
        outfile=outfile,
        revision=revision,
        base_type=base_type,
        pre=pre,
        converter=converter,
        device=device,
        seed=seed,
        keep_reference=keep_reference,
        overwrite=overwrite,
        allow_unprotected=allow_unprotected,
        check_loads=not no_load_check,
        calibration=CalibrationOptions(calib, calib_samples, calib_seqlen),
        max_memory=parse_size(max_memory) if max_memory else None,
    )
    if moved:
        look = None if no_scan else partial(make_guard, accept_findings, False, threads)
        run_moved(request, look, json_output=json_output, report_file=report_file, quiet=quiet)
        return
    if dry_run:
        from qguard_edge.dry_run import dry_run as plan

        _show_dry_run(plan(request), json_output, quiet)
        return
    check_report_file(report_file)
    with ConsoleProgress(quiet) as progress:
        if qvec_text:
            request = _with_searched_strength(request, qvec_text, quiet, progress)
        guard = None if no_scan else make_guard(accept_findings, keep_flagged_f16, threads, progress)
        with refusals(json_output):
            report = convert_model(request, progress, _gate(verify, options, progress), guard)
    if guard:
        show_findings(guard, quiet)
    if isinstance(chosen, QVecOptions) and not (qvec_text or quiet or flags.get("qvec_strength") is not None):
        said = f"qvec: lambda {chosen.strength} is a fixed default; --qvec-text FILE searches it on your text"
        err.print(said, highlight=False)
    document = report_document(report) | guard_document(guard)
    deliver(document, lambda: _show_report(report), report_file=report_file, json_output=json_output, quiet=quiet)
    if report.verification and report.verification.verdict.exit_code:
        raise typer.Exit(report.verification.verdict.exit_code)


def _gate(verify: str | None, options: Any, progress: Any) -> Any:
    """What `--verify` asks for, checked before the conversion begins."""
    if verify is None:
        return None
    from qguard_edge.verify.gate import make_gate
    from quant_grids.errors import UnsupportedError

    if options.file_type.base:
        raise UnsupportedError(
            f"--verify compares a quantized file with its base; --to {options.file_type.name} quantizes nothing"
        )
    return make_gate([name.strip() for name in verify.split(",")], options.threads, 0, progress)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("convert", cls=ConvertCommand, help=HELP)(convert)


def _check_qvec_text(defense: str, text: Path | None, flags: Mapping[str, Any]) -> None:
    """Refuse a search that nothing would use."""
    if text is None:
        return
    if defense != "qvec":
        raise UnsupportedError(f"--qvec-text belongs to --defense qvec, but --defense {defense} was chosen")
    if flags.get("qvec_strength") is not None:
        raise UnsupportedError("--qvec-text searches lambda and --qvec-strength fixes it: give one of them")


def _with_searched_strength(
    request: "ConvertRequest", text: Path, quiet: bool, progress: ConsoleProgress
) -> "ConvertRequest":
    """The request with the lambda that is best on the text."""
    from qguard_edge.fidelity import read_texts
    from qguard_edge.qvec_search import search_strength

    search = search_strength(request, read_texts(text), progress=progress)
    if not quiet:
        err.print(search.summary, highlight=False, soft_wrap=True)
    return replace(request, defense=search.best)


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
        "tensors": [
            {
                "name": rounding.name,
                "type": rounding.ggml_type.name,
                "weights": rounding.n_weights,
                "flips": rounding.outcome.n_changed,
                "share_flipped": rounding.outcome.n_changed / rounding.n_weights,
                "alignment_before": 1.0,
                "alignment": rounding.outcome.alignment,
                "added_squared_error": rounding.outcome.added_error,
            }
            for rounding in report.roundings
        ],
    }


def _show_report(report: "ConvertReport") -> None:
    from qguard_edge.metadata import total_outcome
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


def _show_dry_run(plan: "DryRun", json_output: bool, quiet: bool) -> None:
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
