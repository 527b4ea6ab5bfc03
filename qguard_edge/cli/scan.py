"""`qguard-edge scan`: look before converting."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qguard_edge.cli.console import (
    ConsoleProgress,
    JsonFlag,
    QuietFlag,
    count_text,
    err,
    out,
    percent,
    print_json,
    say,
    styled,
    table,
)
from qguard_edge.cli.convert.scan_first import COLOURS
from qguard_edge.cli.outputs import OverwriteFlag, hold, model_exists
from qguard_edge.cli.report_flags import Html, Sarif
from quant_grids.errors import UnsupportedError

if TYPE_CHECKING:
    from qguard_edge.scan.results import Scan

FAIL_ON = ("info", "suspicious", "dangerous", "never")

HELP = """Look for marks of tampering in MODEL before it is quantized: outliers that blot out their neighbours, weights piled
up at the walls of their quantization cells, numbers that are none.

Without --to it looks for boxes of q4_0, q8_0, int8, nf4 and fp4, which need no quantization. Other types, such as q4_k, are
quantized by llama.cpp into a temporary folder first. `--deep` also measures the dose curve of each llama.cpp type: it runs the
model. Findings are hints, not proof, and a clean scan is no guarantee.

Exit codes: 0 nothing at or above --fail-on, 1 something, 2 the scan failed.

Examples:

    qguard-edge scan ./SmolLM2-135M-Instruct

    qguard-edge scan model-bf16.gguf --to q4_k --to q6_k --html scan.html

    qguard-edge scan ./model --to q4_0 --deep --sarif scan.sarif --fail-on suspicious
"""


def scan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder, hub id, or full-precision .gguf.", show_default=False)
    ],
    to: Annotated[
        list[str] | None,
        typer.Option("--to", metavar="TYPE", help="Type to look for boxes of; repeatable, or separated by commas."),
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also measure the dose curve of each llama.cpp type.")] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="UTF-8 passages for --deep, separated by empty lines. Default: a short built-in set."
        ),
    ] = None,
    fail_on: Annotated[str, typer.Option(help="Exit with 1 from this severity on: info, suspicious, dangerous, never.")] = (
        "dangerous"
    ),
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0 means all cores.")] = 0,
    json_output: JsonFlag = False,
    quiet: QuietFlag = False,
    sarif: Sarif = None,
    html: Html = None,
    overwrite: OverwriteFlag = False,
) -> None:
    """Replaced by HELP when the command is registered."""
    if fail_on not in FAIL_ON:
        raise UnsupportedError(f"--fail-on {fail_on!r}: choose one of {', '.join(FAIL_ON)}")
    if text and not deep:
        raise UnsupportedError("--text is for --deep")
    model_exists(model)
    hold({"--sarif": sarif, "--html": html}, (model, text), overwrite=overwrite)
    wanted = [name.strip().lower() for part in to or () for name in part.split(",") if name.strip()]

    from qguard_edge.scan.findings import Severity
    from qguard_edge.scan.report import exceeds, scan_document, to_html, to_sarif
    from qguard_edge.scan.run import DEFAULT_TYPES, ScanRequest, run_scan

    limit = None if fail_on == "never" else Severity(fail_on)
    request = ScanRequest(model, tuple(wanted) or DEFAULT_TYPES, revision=revision, deep=deep, text=text, threads=threads)
    with ConsoleProgress(quiet or json_output) as progress:
        found = run_scan(request, progress)
    reports = ((sarif, to_sarif(found, fail_on=limit) if sarif else ""), (html, to_html(found) if html else ""))
    for path, content in reports:
        if path is not None:
            from convert.atomic import atomic_path

            with atomic_path(path) as temporary:
                temporary.write_text(content, encoding="utf-8")
    if json_output:
        print_json(scan_document(found, fail_on=limit))
    elif not quiet:
        _show(found)
    if exceeds(found, limit):
        raise typer.Exit(1)


def _show(found: "Scan") -> None:
    from qguard_edge.scan.report import HEADLINES, by_type, honesty

    out.print(
        f"{found.model}: {count_text(found.n_weights)} weights in {found.tensors} tensors, {found.seconds:.1f} s",
        highlight=False,
        markup=False,
    )
    if found.prints:
        rows = table(
            "Positions of the weights in their cells", "type", ">highest peak", ">at", ">on the level", ">emptiest", "found"
        )
        verdicts = by_type(found)
        for kind, made in found.prints.items():
            severity = verdicts[kind]
            mark = styled(f"[{COLOURS[str(severity)]}]{severity}[/]") if severity else "-"
            rows.add_row(
                kind.upper(), f"{made.peak:.2f}", f"{made.place:.3f}", f"{made.level:.2f}", f"{made.band:.2f}", mark
            )
        out.print(rows)
    for curve in found.curves:
        low, high = curve.interval
        rows = table(
            f"Dose curve, {curve.file_type}: lowest over plain {curve.ratio:.2f} ({low:.2f} to {high:.2f})",
            "error direction left",
            *(f">{point.target:g}" for point in curve.points),
        )
        rows.add_row("mean KL to full precision", *(f"{point.mean_kl:.4f}" for point in curve.points))
        out.print(rows)
    if found.outliers:
        name, share, ratio = found.outliers[0]
        out.print(
            f"outliers: at most {percent(share)} of a matrix's chunks have a ratio above 16 ({name}, typical ratio {ratio:.1f})",
            highlight=False,
            markup=False,
        )
    for finding in found.findings:
        colour = COLOURS[str(finding.severity)]
        title = f"{finding.code} {finding.rule.title}"
        out.print(styled(f"\n[{colour}]{finding.severity}[/] {{title}}", title=title), highlight=False)
        say(out, f"{finding.message}.", indent=2)
        say(out, finding.rule.meaning, indent=2, style="dim")
        say(out, finding.rule.advice, indent=2)
    out.print(f"\n{HEADLINES[found.worst]}.", highlight=False)
    err.print(honesty(), style="dim", highlight=False)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("scan", help=HELP)(scan)
