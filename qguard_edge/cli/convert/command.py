"""`qguard-edge convert`: the main job."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qguard_edge.cli.aliases import RenamedOptions
from qguard_edge.cli.console import ConsoleProgress, deliver
from qguard_edge.cli.convert.flags import ConvertFlags, with_flags
from qguard_edge.cli.convert.request import request_from, with_searched_strength
from qguard_edge.cli.convert.scan_first import refusals, show_findings
from qguard_edge.cli.convert.tables import show_dry_run, show_report
from qguard_edge.cli.defense_flags import with_defense_flags
from qguard_edge.cli.outputs import hold, model_exists

if TYPE_CHECKING:
    from qguard_edge.conversion.report import GgufReport

HELP = """Convert MODEL to a hardened GGUF, or to a hardened folder for bitsandbytes.

MODEL is a Hugging Face folder, a hub id (OWNER/NAME), or a .gguf file in F32, F16 or BF16 (the first shard of a split one).
`--to nf4`, `fp4` and `int8` write a pre-quantized Hugging Face folder for servers; `--to hf` writes a full-precision folder
that bitsandbytes' own `load_in_4bit` and `load_in_8bit` round to the hardened codes, and `--to gguf --target TYPE` a
full-precision GGUF whose quantization by llama.cpp is hardened.

Examples:

    qguard-edge convert ./SmolLM2-135M-Instruct --to q4_k

    qguard-edge convert model-bf16.gguf --to q6_k -o model-{ftype}.gguf --keep-plain

    qguard-edge convert ./SmolLM2-135M-Instruct --to q4_0 --defense quantguard --calib chats.jsonl

    qguard-edge convert ./SmolLM2-135M-Instruct --to q4_k --verify

    qguard-edge convert Qwen/Qwen2.5-0.5B-Instruct --to q4_k_m --imatrix imatrix.gguf --dry-run

    qguard-edge convert ./SmolLM2-135M-Instruct --to nf4 --bnb-double-quant -o SmolLM2-135M-NF4

    qguard-edge convert ./SmolLM2-135M-Instruct --to hf --target all

    qguard-edge convert model-bf16.gguf --to gguf --target q4_0
"""


class ConvertCommand(RenamedOptions):
    """Lets `--verify` stand alone: typer has no options whose value may be left out."""

    old_names = {"--keep-reference": "--keep-plain"}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `click.Command.parse_args`."""
        return super().parse_args(ctx, with_default_suites(args))


def with_default_suites(arguments: Sequence[str]) -> list[str]:
    """Arguments in which a `--verify` that no list of names follows asks for the default suites."""
    given = list(arguments)
    for i, argument in enumerate(given):
        following = given[i + 1] if i + 1 < len(given) else ""
        if argument == "--verify" and not (re.fullmatch(r"[a-z]+(,[a-z]+)*", following) and not Path(following).exists()):
            given[i] = "--verify=default"
    return given


def with_type(flags: ConvertFlags) -> ConvertFlags:
    """The flags with the type that the model was trained for, where the user named none.

    Raises:
        UnsupportedError: it was trained for none.
    """
    if flags.to:
        return flags
    from qguard_edge.scan.trained import trained_for

    with ConsoleProgress(flags.quiet) as progress:
        found = trained_for(flags.model, flags.revision, flags.threads, progress)
        progress.note(
            f"--to {found.kind}: the weights of {found.matrices} matrices lie on its levels ({found.on_level:.0%} of those that "
            "count), so they were trained for it (QAT) or quantized to it before"
        )
    return replace(flags, to=found.kind)


def write_model_card(path: Path, report: "GgufReport", model: str) -> None:
    """Write the model card of a conversion of `model`."""
    from convert.atomic import atomic_path
    from qguard_edge.conversion.gguf_card import gguf_card

    with atomic_path(path) as temporary:
        temporary.write_text(gguf_card(report, model), encoding="utf-8")


@with_defense_flags
@with_flags
def convert(flags: ConvertFlags, defense_flags: Mapping[str, Any]) -> None:
    """Replaced by HELP when the command is registered."""
    model_exists(flags.model)
    flags = with_type(flags)
    request = request_from(flags, defense_flags)

    from qguard_edge.conversion.report import GgufReport
    from qguard_edge.conversion.request import FolderRequest, GgufRequest
    from qguard_edge.defenses.options import QVecOptions

    if flags.dry_run:
        from qguard_edge.conversion.dry_run import dry_run

        assert isinstance(request, GgufRequest | FolderRequest)
        show_dry_run(dry_run(request), flags.json_output, flags.quiet, flags.verbose)
        return

    from qguard_edge import api
    from qguard_edge.scan.guard import ScanGuard

    written = {"--report": flags.report_file, "--card": flags.card}
    hold(written, flags.files_read(), overwrite=flags.overwrite)
    with ConsoleProgress(flags.quiet) as progress:
        if flags.qvec_text and isinstance(request, GgufRequest):
            request = with_searched_strength(request, flags, progress)
        guard = None
        if not flags.no_scan:
            guard = ScanGuard(flags.accept_findings, flags.keep_flagged_f16, flags.threads, progress)
        with refusals(flags.json_output):
            report = api.convert(request, scan=guard or False, verify=flags.verify, progress=progress)
        if guard:
            show_findings(guard, flags.quiet)
        fixed = not flags.qvec_text and defense_flags.get("qvec_strength") is None
        if fixed and isinstance(request, GgufRequest) and isinstance(request.defense, QVecOptions):
            strength = request.defense.strength
            progress.note(f"qvec: lambda {strength} is a fixed default; --qvec-text FILE searches it on your text")

    if flags.card and isinstance(report, GgufReport):
        write_model_card(flags.card, report, flags.model)
    deliver(
        api.to_document(report, scan=guard),
        lambda: show_report(report, flags.model, verbose=flags.verbose),
        report_file=flags.report_file,
        json_output=flags.json_output,
        quiet=flags.quiet,
    )
    if report.verification and report.verification.verdict.exit_code:
        raise typer.Exit(report.verification.verdict.exit_code)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("convert", cls=ConvertCommand, help=HELP)(convert)
