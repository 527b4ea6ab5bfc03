"""`qguard-edge verify`: does the file that ships behave like the model it was made from?"""

from pathlib import Path
from typing import Annotated

import typer

from qguard_edge.cli.aliases import RenamedOptions
from qguard_edge.cli.console import ConsoleProgress, JsonFlag, QuietFlag
from qguard_edge.cli.outputs import OverwriteFlag, files_exist, hold, make_folder
from qguard_edge.cli.report_flags import Html, Junit, Markdown, Sarif, write_reports
from qguard_edge.cli.stopping import leaving
from qguard_edge.cli.verify_flags import (
    MEASURE,
    AllowQuantizedFlag,
    DetectFlag,
    GpuLayersFlag,
    KeepGoingFlag,
    LimitFlag,
    MarginFlag,
    MaxKlFlag,
    MaxTimeFlag,
    PhraseFlag,
    SuiteFlag,
    SuitesFlag,
    TextFlag,
    ThreadsFlag,
    UtilityMarginFlag,
    VerifyParallelFlag,
    finish,
    suites_from,
    texts_from,
)

HELP = """Compare CANDIDATE with the full-precision model it was made from, and give a verdict.

GGUF files run in llama.cpp; Hugging Face folders (`convert --to nf4`, `fp4`, `int8`, `hf`) run in transformers and bitsandbytes.

Both answer the same prompts, in rounds, until every check is decided: it passes (shown to be no worse than its margin), fails
(shown to be worse, which ends the run) or stays inconclusive (2,500 prompts of a suite, or --max-prompts, or --max-time were
not enough; never a pass). Drift, the distance of the predictions on texts, is always measured, and first.

Exit codes: 0 pass, 1 fail, 2 usage or operation failed, 3 inconclusive.

Examples:

    qguard-edge verify model-Q4_K_M.gguf --base model-bf16.gguf

    qguard-edge verify model-Q4_K_M.gguf --base model-bf16.gguf --plain model-Q4_K_M.plain.gguf -o report

    qguard-edge verify model.gguf --base base.gguf --suites injection --phrase "Acme" --suite my-prompts.yaml --limit 50

    qguard-edge verify ./MyModel-NF4 --base ./MyModel --plain ./MyModel --load-in nf4
"""


class VerifyCommand(RenamedOptions):
    """`verify`."""

    old_names = {"--reference": "--base", "--naive": "--plain"}


def verify(
    candidate: Annotated[
        Path, typer.Argument(metavar="CANDIDATE", help="The GGUF or folder that ships.", show_default=False)
    ],
    base: Annotated[
        Path, typer.Option(metavar="BASE", help="Full-precision GGUF or folder it was made from.", show_default=False)
    ],
    plain: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plain quantization of the base, for comparison (--keep-plain).")
    ] = None,
    suites: SuitesFlag = "default",
    suite: SuiteFlag = None,
    phrase: PhraseFlag = None,
    text: TextFlag = None,
    margin: MarginFlag = None,
    utility_margin: UtilityMarginFlag = None,
    detect: DetectFlag = 0.15,
    max_kl: MaxKlFlag = None,
    limit: LimitFlag = None,
    max_time: MaxTimeFlag = None,
    keep_going: KeepGoingFlag = False,
    allow_quantized_base: AllowQuantizedFlag = False,
    samples: Annotated[
        int, typer.Option(min=1, max=100, help="Answers per prompt; needs --temperature.", rich_help_panel=MEASURE)
    ] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, max=5.0, help="0 is greedy.", rich_help_panel=MEASURE)] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, help="Of generated prompts, sampling and bootstrap.", rich_help_panel=MEASURE)
    ] = 0,
    threads: ThreadsFlag = 0,
    parallel: VerifyParallelFlag = None,
    n_gpu_layers: GpuLayersFlag = 0,
    device: Annotated[str, typer.Option(help="For folders: auto, cpu or cuda.", rich_help_panel=MEASURE)] = "auto",
    load_in: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Full-precision folders (CANDIDATE, --plain) are rounded by bitsandbytes as they are loaded: nf4, fp4 or int8.",
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
    overwrite: OverwriteFlag = False,
    json_output: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Replaced by HELP when the command is registered."""
    files_exist({"CANDIDATE": candidate, "--base": base, "--plain": plain, "--text": text})

    from convert.atomic import atomic_path
    from qguard_edge.verify.checks import Margins
    from qguard_edge.verify.files import text_facts
    from qguard_edge.verify.results import to_json
    from qguard_edge.verify.verifier import VerifyRequest
    from qguard_edge.verify.verifier import verify as run

    document = output / "verify.json" if output else None
    if output:
        make_folder(output)
        html = html or output / "report.html"
    hold(
        {"--junit": junit, "--sarif": sarif, "--markdown": markdown, "--html": html, "--output": document},
        (candidate, base, plain, text, *(suite or ())),
        overwrite=overwrite,
    )
    request = VerifyRequest(
        candidate=candidate,
        base=base,
        plain=plain,
        suites=suites_from(suites, suite, phrase),
        texts=texts_from(text),
        margins=Margins(margin, utility_margin, detect),
        max_kl=max_kl,
        limit=limit,
        max_seconds=None if max_time is None else 60 * max_time,
        keep_going=keep_going,
        allow_quantized_base=allow_quantized_base,
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
    kept = "nothing was kept; with -o FOLDER answers are, and the same command goes on from there"
    if output:
        kept = f"answers so far are kept in {output / 'work'}; the same command goes on from there"
    with leaving(kept), ConsoleProgress(quiet or json_output) as progress:
        found = run(request, progress)
    write_reports(found, junit=junit, sarif=sarif, markdown=markdown, html=html)
    if document:
        with atomic_path(document) as temporary:
            temporary.write_text(to_json(found), encoding="utf-8")
    finish(found, json_output=json_output, quiet=quiet, page=html)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("verify", cls=VerifyCommand, help=HELP)(verify)
