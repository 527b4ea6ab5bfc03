"""`qguard-edge verify`: does the file that ships behave like the model it was made from?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from qguard_edge.cli.console import ConsoleProgress, err, out, percent, table
from qguard_edge.cli.report_flags import Html, Junit, Markdown, Sarif, check_reports, write_reports

if TYPE_CHECKING:
    from qguard_edge.verify.results import Check, Verification

HELP = """Compare CANDIDATE with the full-precision model it was made from, and give a verdict.

GGUF files run in llama.cpp; Hugging Face folders (`convert --to nf4`, `fp4`, `int8`, `hf`) run in transformers and bitsandbytes.

Both get the same token ids; answers are paired by prompt. Each check passes (shown to be no worse than the margin), fails
(shown to be worse) or is inconclusive (too few prompts; never a pass). Drift is always measured.

Exit codes: 0 pass, 1 fail, 2 usage or operation failed, 3 inconclusive.

Examples:

    qguard-edge verify model-Q4_K_M.gguf --base model-bf16.gguf

    qguard-edge verify model-Q4_K_M.gguf --base model-bf16.gguf --plain model-Q4_K_M.base.gguf -o report

    qguard-edge verify model.gguf --base base.gguf --suites injection --phrase "Acme" --suite my-prompts.yaml --limit 50

    qguard-edge verify ./MyModel-NF4 --base ./MyModel --plain ./MyModel --load-in nf4
"""

MEASURE = "How it is measured"
COLOURS = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}


def verify(
    candidate: Annotated[
        Path, typer.Argument(metavar="CANDIDATE", help="The GGUF or folder that ships.", show_default=False)
    ],
    base: Annotated[
        Path, typer.Option(metavar="BASE", help="Full-precision GGUF or folder it was made from.", show_default=False)
    ],
    plain: Annotated[
        Path | None, typer.Option(metavar="REF", help="Plain quantization of the base, for comparison (--keep-base).")
    ] = None,
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
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Prompts per suite, and texts, at most.")] = None,
    samples: Annotated[
        int, typer.Option(min=1, max=100, help="Answers per prompt; needs --temperature.", rich_help_panel=MEASURE)
    ] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, max=5.0, help="0 is greedy.", rich_help_panel=MEASURE)] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling and bootstrap.", rich_help_panel=MEASURE)] = 0,
    threads: Annotated[
        int, typer.Option(min=0, envvar="QGUARD_THREADS", help="0 means all cores.", rich_help_panel=MEASURE)
    ] = 0,
    parallel: Annotated[
        int, typer.Option(min=1, max=256, help="Answers generated side by side.", rich_help_panel=MEASURE)
    ] = 32,
    n_gpu_layers: Annotated[
        int, typer.Option("--n-gpu-layers", "-ngl", min=-1, help="Layers on the GPU; -1: all.", rich_help_panel=MEASURE)
    ] = 0,
    device: Annotated[str, typer.Option(help="For folders: auto, cpu or cuda.", rich_help_panel=MEASURE)] = "auto",
    load_in: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="For full-precision folders as CANDIDATE or REF: let bitsandbytes round them to nf4, fp4 or int8 while loading.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FOLDER", help="Write the report here; a killed run goes on from it."),
    ] = None,
    junit: Junit = None,
    sarif: Sarif = None,
    markdown: Markdown = None,
    html: Html = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
) -> None:
    """Replaced by HELP when the command is registered."""
    from convert.atomic import atomic_path
    from qguard_edge.runtimes.fidelity import read_texts
    from qguard_edge.verify.checks import Margins
    from qguard_edge.verify.files import text_facts
    from qguard_edge.verify.results import to_json
    from qguard_edge.verify.suites.files import read_suite
    from qguard_edge.verify.verifier import VerifyRequest, select_suites
    from qguard_edge.verify.verifier import verify as run

    check_reports(junit=junit, sarif=sarif, markdown=markdown, html=html)
    names = [name.strip() for name in suites.split(",") if name.strip()]
    request = VerifyRequest(
        candidate=candidate,
        base=base,
        plain=plain,
        suites=select_suites(names, [read_suite(path) for path in suite or ()], phrase or ()),
        texts=tuple(read_texts(text)) if text else (),
        margins=Margins(margin, utility_margin, detect),
        max_kl=max_kl,
        limit=limit,
        samples=samples,
        temperature=temperature,
        seed=seed,
        threads=threads,
        parallel=parallel,
        n_gpu_layers=n_gpu_layers,
        device=device,
        load_in=load_in,
        work=output / "work" if output else None,
        sources=(*(text_facts("suite", path) for path in suite or ()), *([text_facts("text", text)] if text else [])),
    )
    with ConsoleProgress(quiet or json_output) as progress:
        outcome = run(request, progress)
    html = html or (output / "report.html" if output else None)
    write_reports(outcome, junit=junit, sarif=sarif, markdown=markdown, html=html)
    if output:
        with atomic_path(output / "verify.json") as temporary:
            temporary.write_text(to_json(outcome), encoding="utf-8")
    if json_output:
        out.file.write(to_json(outcome))
    elif not quiet:
        show_outcome(outcome)
    if outcome.verdict.exit_code:
        raise typer.Exit(outcome.verdict.exit_code)


def show_outcome(outcome: "Verification") -> None:
    """The outcome as tables on standard output."""
    plain = any(check.plain_verdict for check in outcome.checks)
    names = {facts.role: facts.name for facts in outcome.files}
    columns = ["check", "verdict", ">candidate", ">base", *([">plain"] if plain else []), ">difference (90%)", ">n"]
    rows = table(f"{names['candidate']} against {names['base']}", *columns)
    for check in outcome.checks:
        rows.add_row(*_row(check, outcome, plain))
    out.print(rows)
    for check in outcome.checks:
        out.print(f"[{COLOURS[check.verdict]}]{check.verdict}[/] {check.id}: {escape(check.reason)}", highlight=False)
    _show_findings(outcome)
    if outcome.drift:
        _show_drift(outcome.drift)
    for warning in outcome.warnings:
        err.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False)
    for limit in outcome.limits:
        out.print(f"[dim]{escape(limit)}[/]", highlight=False)
    out.print(f"[{COLOURS[outcome.verdict]}]{outcome.verdict}[/]: {escape(outcome.summary)}", highlight=False)


def _row(check: "Check", outcome: "Verification", plain: bool) -> list[str]:
    """One line of the table."""
    verdict = f"[{COLOURS[check.verdict]}]{check.verdict}[/]"
    if check.candidate is None or check.base is None or check.difference is None:
        drift = outcome.drift
        cells = [f"KL {drift.candidate.mean_kl:.3g}" if drift else "", "KL 0"]
        if plain:
            cells.append(f"KL {drift.plain.mean_kl:.3g}" if drift and drift.plain else "")
        return [check.id, verdict, *cells, "", str(check.prompts)]
    gap = check.difference
    cells = [percent(check.candidate.value), percent(check.base.value)]
    if plain:
        cells.append(percent(check.plain.value) if check.plain else "")
    between = f"{100 * gap.value:+.1f} ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
    return [check.id, verdict, *cells, between, str(gap.n)]


def _show_findings(outcome: "Verification") -> None:
    listed = [(check, finding) for check in outcome.checks for finding in check.findings]
    if not listed:
        return
    rows = table(
        "Words and phrases that became more frequent",
        "suite",
        "phrase",
        ">candidate",
        ">base",
        ">plain",
        ">p (corrected)",
    )
    for check, finding in listed:
        rows.add_row(
            check.suite,
            escape(finding.phrase),
            f"{finding.candidate}/{finding.n}",
            f"{finding.base}/{finding.n}",
            "" if finding.plain is None else f"{finding.plain}/{finding.n}",
            f"{finding.adjusted_p:.2g}",
        )
    out.print(rows)


def _show_drift(drift: Any) -> None:
    rows = table(
        f"Drift on {drift.tokens} tokens of {drift.documents} texts (noise floor {drift.noise_floor:.2g})",
        "file", ">mean KL (95%)", ">99.9% KL", ">same top", ">perplexity ratio (95%)",
    )  # fmt: skip
    for name, numbers in (("candidate", drift.candidate), ("plain", drift.plain)):
        if numbers is not None:
            rows.add_row(
                name,
                f"{numbers.mean_kl:.4f} ({numbers.mean_kl_low:.4f} to {numbers.mean_kl_high:.4f})",
                f"{numbers.kl_999:.2f}",
                percent(numbers.same_top),
                f"{numbers.perplexity_ratio:.3f} ({numbers.perplexity_ratio_low:.3f} to {numbers.perplexity_ratio_high:.3f})",
            )
    out.print(rows)
    if drift.band:
        usual = f"{drift.band.low:.3g} to {drift.band.high:.3g}"
        out.print(f"usual for {drift.band.file_type}: {usual} ({drift.band.source})", highlight=False)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("verify", help=HELP)(verify)
