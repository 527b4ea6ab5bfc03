"""`qguard-edge convert`: the main job."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from qguard_edge.cli.calibration_flags import CalibAddFlag, CalibFlag, CalibSamplesFlag, CalibSeqlenFlag, MaxMemoryFlag
from qguard_edge.cli.console import (
    ConsoleProgress,
    check_report_file,
    deliver,
    err,
)
from qguard_edge.cli.convert_folder import refuse_foreign_flags, run_folder
from qguard_edge.cli.convert_moved import run_moved
from qguard_edge.cli.convert_report import report_document, show_dry_run, show_report
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
    from qguard_edge.conversion import ConvertRequest

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
    calib_add: CalibAddFlag = None,
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
            calibration=CalibrationOptions(calib, calib_samples, calib_seqlen, calib_add),
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
    from qguard_edge.conversion import ConvertRequest
    from qguard_edge.learned.memory import parse_size
    from qguard_edge.pipeline import convert_model

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
        calibration=CalibrationOptions(calib, calib_samples, calib_seqlen, calib_add),
        max_memory=parse_size(max_memory) if max_memory else None,
    )
    if moved:
        look = None if no_scan else partial(make_guard, accept_findings, False, threads)
        run_moved(request, look, json_output=json_output, report_file=report_file, quiet=quiet)
        return
    if dry_run:
        from qguard_edge.dry_run import dry_run as plan

        show_dry_run(plan(request), json_output, quiet)
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
    deliver(document, lambda: show_report(report), report_file=report_file, json_output=json_output, quiet=quiet)
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
