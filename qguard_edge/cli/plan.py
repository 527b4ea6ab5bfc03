"""`qguard-edge plan` and `qguard-edge apply`: choose the rounding on one machine, write the file on another."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from qguard_edge.cli.calibration_flags import CalibAddFlag, CalibFlag, CalibSamplesFlag, CalibSeqlenFlag, MaxMemoryFlag
from qguard_edge.cli.console import ConsoleProgress, count_text, out, percent, print_json
from qguard_edge.cli.convert_folder import show_learned
from qguard_edge.cli.defense_flags import options_from, with_defense_flags

PLAN_HELP = """Choose the rounding of REFERENCE and write it down as a plan, without llama.cpp.

For a machine with a GPU: learned defenses run MODEL with torch there; `qguard-edge apply` needs neither torch's model nor
the base.

Example:

    qguard-edge convert ./model --to bf16 -o base.gguf

    qguard-edge convert base.gguf --to q4_k --defense none -o reference.gguf

    qguard-edge plan ./model --base base.gguf --reference reference.gguf -o plan.safetensors --device cuda

    qguard-edge apply plan.safetensors --reference reference.gguf -o model-Q4_K_M.gguf
"""

APPLY_HELP = """Write the hardened GGUF of a plan: REFERENCE with the plan's code bits, everything else byte for byte.

Example:

    qguard-edge apply plan.safetensors --reference reference.gguf -o model-Q4_K_M.gguf
"""

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]


@with_defense_flags
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or .gguf that transformers can run.")],
    base: Annotated[Path, typer.Option(metavar="FILE", help="Full-precision GGUF of the model.")],
    reference: Annotated[Path, typer.Option(metavar="FILE", help="llama.cpp's own quantization of the base.")],
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
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0 means all cores.")] = 0,
    allow_unprotected: Annotated[
        bool, typer.Option("--allow-unprotected", help="Accept tensors whose type no defense can reach.")
    ] = False,
    json_output: JsonFlag = False,
    quiet: QuietFlag = False,
    **flags: Any,
) -> None:
    """Replaced by PLAN_HELP when the command is registered."""
    chosen = options_from(defense, flags)

    from qguard_edge.calibration import CalibrationOptions
    from qguard_edge.learned.memory import parse_size
    from qguard_edge.planning import PlanRequest, make_plan

    request = PlanRequest(
        model=model,
        base=base,
        reference=reference,
        outfile=outfile,
        defense=chosen,
        revision=revision,
        device=device,
        seed=seed,
        threads=threads,
        allow_unprotected=allow_unprotected,
        calibration=CalibrationOptions(calib, calib_samples, calib_seqlen, calib_add),
        max_memory=parse_size(max_memory) if max_memory else None,
    )
    with ConsoleProgress(quiet) as progress:
        report = make_plan(request, progress)
    share = report.outcome.n_changed / max(report.weights, 1)
    if json_output:
        print_json(
            {
                "status": "ok",
                "outfile": report.outfile.name,
                "defense": chosen.name,
                "seed": report.seed,
                "tensors": report.tensors,
                "weights": report.weights,
                "share_flipped": share,
                "alignment": report.outcome.alignment,
                "learned": asdict(report.learned) if report.learned else None,
            }
        )
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
    reference: Annotated[Path, typer.Option(metavar="FILE", help="The reference the plan was made for.")],
    outfile: Annotated[Path, typer.Option("-o", "--outfile", help="The hardened GGUF.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    json_output: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Replaced by APPLY_HELP when the command is registered."""
    from qguard_edge.planning import apply_to

    with ConsoleProgress(quiet) as progress:
        report = apply_to(plan_file, reference, outfile, overwrite=overwrite, progress=progress)
    changed = sum(report.changed.values())
    if json_output:
        metadata = dict(report.header["metadata"])
        print_json({"status": "ok", "outfile": outfile.name, "codes_changed": changed, "qguard": metadata})
    elif not quiet:
        text = f"{changed} codes changed in {len(report.changed)} tensors, nothing else; wrote {outfile.name}"
        out.print(text, highlight=False, markup=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("plan", help=PLAN_HELP)(plan)
    app.command("apply", help=APPLY_HELP)(apply)
