"""`qguard-edge imatrix`: make an importance matrix."""

from pathlib import Path
from typing import Annotated

import typer

from qguard_edge.cli.console import ConsoleProgress, JsonFlag, count_text, err, out, print_json, styled
from qguard_edge.cli.outputs import OverwriteFlag, hold

HELP = """Make an importance matrix: how much the error of each input column matters, measured on text.

The file is llama.cpp's GGUF format; llama-quantize reads it too.

Example:

    qguard-edge imatrix ./model --text calibration.txt -o model.imatrix.gguf
"""


def imatrix(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or full-precision .gguf.")],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text to measure on.")],
    outfile: Annotated[Path, typer.Option("-o", "--outfile", help="Output.")] = Path("imatrix.gguf"),
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    chunk_size: Annotated[int, typer.Option(min=8, help="Tokens per piece of text.")] = 512,
    max_chunks: Annotated[int, typer.Option(min=1, help="Pieces of text to use at most.")] = 100,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    converter: Annotated[
        Path | None, typer.Option(help="llama.cpp's convert_hf_to_gguf.py, for other architectures, as for `convert`.")
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Let that converter read a folder that brings Python code, which it may run."
        ),
    ] = False,
    overwrite: OverwriteFlag = False,
    json_output: JsonFlag = False,
) -> None:
    """Replaced by HELP when the command is registered."""
    from qguard_edge.runtimes.devices import resolve_device
    from qguard_edge.runtimes.imatrix import make_imatrix

    hold({"--outfile": outfile}, (model, text, converter), overwrite=overwrite)
    with ConsoleProgress(json_output) as progress:
        report = make_imatrix(
            model,
            text,
            outfile,
            revision=revision,
            chunk_size=chunk_size,
            max_chunks=max_chunks,
            device=resolve_device(device),
            converter=converter,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if json_output:
        print_json(
            {
                "status": "ok",
                "outfile": report.outfile.name,
                "entries": report.entries,
                "missing": list(report.missing),
                "tokens": report.tokens,
                "chunks": report.chunks,
            }
        )
        return
    if report.missing:
        missing = f"{len(report.missing)} matrices have no entry, the first is {report.missing[0]}"
        err.print(styled("[yellow]warning:[/] {missing}", missing=missing))
    out.print(
        f"wrote {report.outfile}: {report.entries} matrices measured on {count_text(report.tokens)} tokens", highlight=False
    )


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("imatrix", help=HELP)(imatrix)
