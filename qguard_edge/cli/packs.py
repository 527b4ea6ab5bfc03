"""`qguard-edge baseline` and `qguard-edge check`: verification without the base at hand."""

from pathlib import Path
from typing import Annotated

import typer

from convert.sizes import size_text
from qguard_edge.cli.console import ConsoleProgress, JsonFlag, QuietFlag, err, out, print_json, styled
from qguard_edge.cli.outputs import OverwriteFlag, hold
from qguard_edge.cli.report_flags import Html, Junit, Markdown, Sarif, write_reports
from qguard_edge.cli.verify_flags import (
    MEASURE,
    AllowQuantizedFlag,
    DetectFlag,
    GpuLayersFlag,
    KeepGoingFlag,
    LimitFlag,
    MarginFlag,
    MaxKlFlag,
    ParallelFlag,
    PhraseFlag,
    SuiteFlag,
    SuitesFlag,
    TextFlag,
    ThreadsFlag,
    UtilityMarginFlag,
    finish,
    suites_from,
    texts_from,
)

BASELINE_HELP = """Run BASE once on all prompts and texts and record the results, so that candidates can be checked without it.

The pack holds prompts as token ids, greedy answers, match results and the likeliest next tokens on texts; of a suite that has
more the first 448 prompts (--max-prompts), enough for most files.

Examples:

    qguard-edge baseline model-bf16.gguf -o baseline.json

    qguard-edge baseline model-bf16.gguf -o baseline.json --suites injection --suite my-prompts.yaml --limit 100
"""

CHECK_HELP = """Check CANDIDATE, or the model in a running server, against a baseline pack.

As `verify`, but without the base: a check passes (shown to be no worse than the margin), fails (shown to be worse) or is
inconclusive (the prompts of the pack, or --max-prompts, were not enough). Drift is always measured. A key for the server is
read from QGUARD_SERVER_KEY.

Exit codes: 0 pass, 1 fail, 2 usage or operation failed, 3 inconclusive.

Examples:

    qguard-edge check model-Q4_K_M.gguf --baseline baseline.json

    qguard-edge check --server http://127.0.0.1:8080 --baseline baseline.json --html report.html
"""


def baseline(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The full-precision GGUF.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PACK", help="The pack to write.", show_default=False)],
    suites: SuitesFlag = "default",
    suite: SuiteFlag = None,
    phrase: PhraseFlag = None,
    text: TextFlag = None,
    limit: LimitFlag = None,
    top_k: Annotated[
        int, typer.Option(min=1, max=1000, help="Likeliest tokens to keep per position.", rich_help_panel=MEASURE)
    ] = 32,
    threads: ThreadsFlag = 0,
    parallel: ParallelFlag = 32,
    n_gpu_layers: GpuLayersFlag = 0,
    allow_quantized_base: AllowQuantizedFlag = False,
    overwrite: OverwriteFlag = False,
    json_output: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Replaced by BASELINE_HELP when the command is registered."""
    from qguard_edge.packs.pack import write_pack
    from qguard_edge.packs.record import BaselineRequest, record

    hold({"--output": output}, (base, text, *(suite or ())), overwrite=overwrite)
    request = BaselineRequest(
        base=base,
        suites=suites_from(suites, suite, phrase),
        texts=texts_from(text),
        limit=limit,
        top_k=top_k,
        threads=threads,
        parallel=parallel,
        n_gpu_layers=n_gpu_layers,
        allow_quantized_base=allow_quantized_base,
    )
    with ConsoleProgress(quiet or json_output) as progress:
        pack = record(request, progress)
    write_pack(pack, output)
    prompts = {one.name: len(one.prompts) for one in pack.suites}
    if json_output:
        print_json(
            {
                "status": "ok",
                "outfile": output.name,
                "pack_version": pack.pack_version,
                "base_sha256": pack.base.sha256,
                "prompts": prompts,
                "texts": len(pack.texts),
                "noise_floor": pack.noise_floor,
                "bytes": output.stat().st_size,
                "warnings": list(pack.warnings),
            }
        )
    elif not quiet:
        for warning in pack.warnings:
            err.print(styled("[yellow]warning:[/] {warning}", warning=warning), highlight=False)
        listed = ", ".join(f"{name} {count}" for name, count in prompts.items())
        out.print(
            f"wrote {output.name} ({size_text(output.stat().st_size)}): {listed or 'no prompts'}, {len(pack.texts)} texts, "
            f"noise floor {pack.noise_floor:.2g}",
            highlight=False, markup=False,
        )  # fmt: skip


def check(
    baseline: Annotated[Path, typer.Option(metavar="PACK", help="Written by `qguard-edge baseline`.", show_default=False)],
    candidate: Annotated[
        Path | None, typer.Argument(metavar="CANDIDATE", help="The GGUF that ships.", show_default=False)
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Check the model in a running llama-server instead of a file.")
    ] = None,
    margin: MarginFlag = None,
    utility_margin: UtilityMarginFlag = None,
    detect: DetectFlag = 0.15,
    max_kl: MaxKlFlag = None,
    limit: LimitFlag = None,
    keep_going: KeepGoingFlag = False,
    threads: ThreadsFlag = 0,
    parallel: ParallelFlag = 32,
    n_gpu_layers: GpuLayersFlag = 0,
    junit: Junit = None,
    sarif: Sarif = None,
    markdown: Markdown = None,
    html: Html = None,
    overwrite: OverwriteFlag = False,
    json_output: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Replaced by CHECK_HELP when the command is registered."""
    from qguard_edge.packs.check import CheckRequest
    from qguard_edge.packs.check import check as run
    from qguard_edge.packs.pack import read_pack
    from qguard_edge.verify.checks import Margins
    from qguard_edge.verify.files import text_facts

    reports = {"junit": junit, "sarif": sarif, "markdown": markdown, "html": html}
    hold({f"--{name}": path for name, path in reports.items()}, (baseline, candidate), overwrite=overwrite)
    request = CheckRequest(
        pack=read_pack(baseline),
        source=text_facts("suite", baseline),
        candidate=candidate,
        server=server,
        margins=Margins(margin, utility_margin, detect),
        max_kl=max_kl,
        limit=limit,
        keep_going=keep_going,
        threads=threads,
        parallel=parallel,
        n_gpu_layers=n_gpu_layers,
    )
    with ConsoleProgress(quiet or json_output) as progress:
        found = run(request, progress)
    write_reports(found, **reports)
    if not (json_output or quiet):
        for path in reports.values():
            if path is not None:
                err.print(f"wrote {path.name}", highlight=False, markup=False)
    finish(found, json_output=json_output, quiet=quiet, page=html)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("baseline", help=BASELINE_HELP)(baseline)
    app.command("check", help=CHECK_HELP)(check)
