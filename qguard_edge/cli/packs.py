"""`qguard-edge baseline` and `qguard-edge check`: verification without the base at hand."""

from pathlib import Path
from typing import Annotated

import typer

from qguard_edge.cli.console import ConsoleProgress, err, out, print_json, size_text
from qguard_edge.cli.report_flags import Html, Junit, Markdown, Sarif, check_reports, write_reports

BASELINE_HELP = """Ask BASE everything once and write it down, so that candidates can be checked without it.

The pack holds prompts as token ids, greedy answers, match results and the likeliest next tokens on texts.

Examples:

    qguard-edge baseline model-bf16.gguf -o baseline.json

    qguard-edge baseline model-bf16.gguf -o baseline.json --suites injection --suite my-prompts.yaml --limit 100
"""

CHECK_HELP = """Check CANDIDATE, or the model in a running server, against a baseline pack.

As `verify`, but without the base: a check passes (shown to be no worse than the margin), fails (shown to be worse) or is
inconclusive. Drift is always measured. A key for the server is read from QGUARD_SERVER_KEY.

Exit codes: 0 pass, 1 fail, 2 usage or operation failed, 3 inconclusive.

Examples:

    qguard-edge check model-Q4_K_M.gguf --baseline baseline.json

    qguard-edge check --server http://127.0.0.1:8080 --baseline baseline.json --html report.html
"""

MEASURE = "How it is measured"
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Prompts per suite, and texts, at most.")]
Threads = Annotated[int, typer.Option(min=0, envvar="QGUARD_THREADS", help="0 means all cores.", rich_help_panel=MEASURE)]
Parallel = Annotated[int, typer.Option(min=1, max=256, help="Answers generated side by side.", rich_help_panel=MEASURE)]
GpuLayers = Annotated[
    int, typer.Option("--n-gpu-layers", "-ngl", min=-1, help="Layers on the GPU; -1: all.", rich_help_panel=MEASURE)
]
JsonOutput = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]


def baseline(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The full-precision GGUF.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PACK", help="The pack to write.", show_default=False)],
    suites: Annotated[
        str, typer.Option(help="Built-in suites: injection, refusal, code, separated by commas; all; drift for drift alone.")
    ] = "all",
    suite: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Your own suite, .yaml or .jsonl; repeatable.")
    ] = None,
    phrase: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Also look for this phrase in the answers; repeatable.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts for drift, separated by empty lines. Default: a built-in set.")
    ] = None,
    limit: Limit = None,
    top_k: Annotated[
        int, typer.Option(min=1, max=1000, help="Likeliest tokens to keep per position.", rich_help_panel=MEASURE)
    ] = 32,
    threads: Threads = 0,
    parallel: Parallel = 32,
    n_gpu_layers: GpuLayers = 0,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Replaced by BASELINE_HELP when the command is registered."""
    from convert.atomic import atomic_path, check_writable
    from qguard_edge.packs.pack import pack_to_json
    from qguard_edge.packs.record import BaselineRequest, record
    from qguard_edge.runtimes.fidelity import read_texts
    from qguard_edge.verify.suites.files import read_suite
    from qguard_edge.verify.verifier import select_suites

    check_writable(output, "--output")
    names = [name.strip() for name in suites.split(",") if name.strip()]
    request = BaselineRequest(
        base=base,
        suites=select_suites(names, [read_suite(path) for path in suite or ()], phrase or ()),
        texts=tuple(read_texts(text)) if text else (),
        limit=limit,
        top_k=top_k,
        threads=threads,
        parallel=parallel,
        n_gpu_layers=n_gpu_layers,
    )
    with ConsoleProgress(quiet or json_output) as progress:
        pack = record(request, progress)
    with atomic_path(output) as temporary:
        temporary.write_text(pack_to_json(pack), encoding="utf-8")
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
            }
        )
    elif not quiet:
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
    margin: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Difference of a security rate that is still no worse.")
    ] = 0.02,
    utility_margin: Annotated[float, typer.Option(min=0.0, max=0.9, help="The same for utility rates.")] = 0.1,
    detect: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of answers a new phrase must show in to be found for sure.")
    ] = 0.15,
    max_kl: Annotated[
        float | None, typer.Option(min=0.0, help="Highest mean KL that passes. Default: by the candidate's type.")
    ] = None,
    limit: Limit = None,
    threads: Threads = 0,
    parallel: Parallel = 32,
    n_gpu_layers: GpuLayers = 0,
    junit: Junit = None,
    sarif: Sarif = None,
    markdown: Markdown = None,
    html: Html = None,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Replaced by CHECK_HELP when the command is registered."""
    from qguard_edge.cli.verify import show_outcome
    from qguard_edge.packs.check import CheckRequest
    from qguard_edge.packs.check import check as run
    from qguard_edge.packs.pack import read_pack
    from qguard_edge.verify.checks import Margins
    from qguard_edge.verify.files import text_facts
    from qguard_edge.verify.results import to_json

    check_reports(junit=junit, sarif=sarif, markdown=markdown, html=html)
    request = CheckRequest(
        pack=read_pack(baseline),
        source=text_facts("suite", baseline),
        candidate=candidate,
        server=server,
        margins=Margins(margin, utility_margin, detect),
        max_kl=max_kl,
        limit=limit,
        threads=threads,
        parallel=parallel,
        n_gpu_layers=n_gpu_layers,
    )
    with ConsoleProgress(quiet or json_output) as progress:
        outcome = run(request, progress)
    write_reports(outcome, junit=junit, sarif=sarif, markdown=markdown, html=html)
    if json_output:
        out.file.write(to_json(outcome))
    elif not quiet:
        show_outcome(outcome)
        for path in (junit, sarif, markdown, html):
            if path is not None:
                err.print(f"wrote {path.name}", highlight=False, markup=False)
    if outcome.verdict.exit_code:
        raise typer.Exit(outcome.verdict.exit_code)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("baseline", help=BASELINE_HELP)(baseline)
    app.command("check", help=CHECK_HELP)(check)
