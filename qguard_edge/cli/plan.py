"""`qguard-edge plan` and `qguard-edge apply`: choose the rounding on one machine, write the file on another."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qguard_edge.cli.aliases import RenamedOptions
from qguard_edge.cli.calibration_flags import (
    CalibAddFlag,
    CalibFlag,
    CalibSamplesFlag,
    CalibSeqlenFlag,
    MaxMemoryFlag,
)
from qguard_edge.cli.console import ConsoleProgress, JsonFlag, count_text, out, percent, print_json
from qguard_edge.cli.convert.scan_first import refusals, show_findings
from qguard_edge.cli.convert.tables import show_learned
from qguard_edge.cli.defense_flags import options_from, with_defense_flags
from qguard_edge.cli.split_flags import KeepSplitFlag, SplitMaxSizeFlag, SplitMaxTensorsFlag, split_rule

PLAN_HELP = """Choose the rounding of a plain GGUF and write it down as a plan, without llama.cpp.

For a machine with a GPU: learned defenses run MODEL with torch there; `qguard-edge apply` needs neither torch's model nor
the base.

Example:

    qguard-edge convert ./model --to bf16 -o base.gguf

    qguard-edge convert base.gguf --to q4_k --defense none -o plain.gguf

    qguard-edge plan ./model --base base.gguf --plain plain.gguf -o plan.safetensors --device cuda

    qguard-edge apply plan.safetensors --plain plain.gguf -o model-Q4_K_M.gguf
"""

APPLY_HELP = """Write the hardened GGUF of a plan: the plain file with the plan's code bits, everything else byte for byte.

Example:

    qguard-edge apply plan.safetensors --plain plain.gguf -o model-Q4_K_M.gguf
"""

QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]


class PlanCommand(RenamedOptions):
    """`plan` and `apply`."""

    old_names = {"--reference": "--plain"}


@with_defense_flags
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or .gguf that transformers can run.")],
    base: Annotated[Path, typer.Option(metavar="FILE", help="Full-precision GGUF of the model.")],
    plain: Annotated[Path, typer.Option(metavar="FILE", help="llama.cpp's own quantization of the base.")],
    outfile: Annotated[Path, typer.Option("-o", "--outfile", help="The plan, a .safetensors file.")],
    defense: Annotated[str, typer.Option(help="Rounding defense, see `qguard-edge defenses`.")] = "quantguard",
    seed: Annotated[int | None, typer.Option(min=0, help="Repeat a plan. Default: fresh, recorded.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    calib: CalibFlag = None,
    calib_add: CalibAddFlag = None,
    calib_samples: CalibSamplesFlag = None,
    calib_seqlen: CalibSeqlenFlag = 256,
    max_memory: MaxMemoryFlag = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Let transformers run Python code that the folder brings: in this process, unlimited.",
        ),
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0 means all cores.")] = 0,
    allow_unprotected: Annotated[
        bool, typer.Option("--allow-unprotected", help="Accept tensors whose type no defense can reach.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing plan.")] = False,
    no_scan: Annotated[bool, typer.Option("--no-scan", help="Do not scan the base first.")] = False,
    accept_findings: Annotated[
        bool, typer.Option("--accept-findings", help="Plan even if the scan calls the base dangerous.")
    ] = False,
    json_output: JsonFlag = False,
    quiet: QuietFlag = False,
    **flags: Any,
) -> None:
    """Replaced by PLAN_HELP when the command is registered."""
    chosen = options_from(defense, flags)

    from qguard_edge import api
    from qguard_edge.conversion.request import PlanRequest
    from qguard_edge.learned.calibration import CalibrationOptions
    from qguard_edge.learned.memory import parse_size
    from qguard_edge.scan.guard import ScanGuard

    request = PlanRequest(
        model=model,
        base=base,
        plain=plain,
        outfile=outfile,
        defense=chosen,
        revision=revision,
        device=device,
        seed=seed,
        threads=threads,
        trust_remote_code=trust_remote_code,
        allow_unprotected=allow_unprotected,
        calibration=CalibrationOptions(calib, calib_samples, calib_seqlen, calib_add),
        max_memory=parse_size(max_memory) if max_memory else None,
        overwrite=overwrite,
        check_loads=False,
    )
    with ConsoleProgress(quiet) as progress:
        guard = None if no_scan else ScanGuard(accept=accept_findings, threads=threads, progress=progress)
        with refusals(json_output):
            report = api.plan(request, scan=guard or False, progress=progress)
        if guard:
            show_findings(guard, quiet)
    share = report.outcome.n_changed / max(report.weights, 1)
    if json_output:
        print_json(api.to_document(report, scan=guard))
    elif not quiet:
        if report.learned:
            show_learned(report.learned)
        out.print(
            f"{report.tensors} tensors, {count_text(report.weights)} weights, {percent(share)} flipped, alignment "
            f"{report.outcome.alignment:.2f}, seed {report.seed}; wrote {report.outfile.name}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def apply(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="What `qguard-edge plan` wrote.")],
    plain: Annotated[Path, typer.Option(metavar="FILE", help="The plain file that the plan was made for.")],
    outfile: Annotated[Path, typer.Option("-o", "--outfile", help="The hardened GGUF.")],
    split_max_size: SplitMaxSizeFlag = None,
    split_max_tensors: SplitMaxTensorsFlag = None,
    keep_split: KeepSplitFlag = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    json_output: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Replaced by APPLY_HELP when the command is registered."""
    from qguard_edge import api

    with ConsoleProgress(quiet) as progress:
        split = split_rule(split_max_size, split_max_tensors, keep_split)
        report = api.apply(plan_file, plain, outfile, overwrite=overwrite, split=split, progress=progress)
    changed = sum(report.changed.values())
    if json_output:
        metadata = dict(report.header["metadata"])
        print_json({"status": "ok", "outfile": report.outfile.name, "codes_changed": changed, "qguard": metadata})
    elif not quiet:
        text = f"{changed} codes changed in {len(report.changed)} tensors, nothing else; wrote {report.outfile.name}"
        out.print(text, highlight=False, markup=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("plan", cls=PlanCommand, help=PLAN_HELP)(plan)
    app.command("apply", cls=PlanCommand, help=APPLY_HELP)(apply)
