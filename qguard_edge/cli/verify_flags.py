"""The options that `verify`, `baseline` and `check` share, and what the three do with them."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qguard_edge.cli.console import out

if TYPE_CHECKING:
    from qguard_edge.verify.results import Verification
    from qguard_edge.verify.suites.base import Suite

MEASURE = "How it is measured"
LIMITS = ("--max-prompts", "--limit")

SuitesFlag = Annotated[
    str,
    typer.Option(
        help="Built-in suites, separated by commas: injection, refusal, code (default: these three), tools, long, "
        "languages; all; drift for drift alone."
    ),
]
SuiteFlag = Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Your own suite, .yaml or .jsonl; repeatable.")]
PhraseFlag = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="Also look for this phrase in the answers; repeatable.")
]
TextFlag = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Texts for drift, separated by empty lines. Default: a built-in set.")
]
MarginFlag = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=0.5,
        help="Difference of a security rate that is still no worse. Default: each check's own, 0.02 to 0.1.",
    ),
]
UtilityMarginFlag = Annotated[
    float | None, typer.Option(min=0.0, max=0.9, help="The same for utility rates. Default: each check's own, 0.1 or 0.15.")
]
DetectFlag = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="Share of answers a new phrase must show in to be found for sure.")
]
MaxKlFlag = Annotated[
    float | None, typer.Option(min=0.0, help="Highest mean KL that passes. Default: by the candidate's type.")
]
LimitFlag = Annotated[
    int | None,
    typer.Option(
        "--max-prompts",
        "--limit",
        min=1,
        metavar="N",
        help="Prompts per suite, and texts, at most. Default: see above.",
        show_default=False,
    ),
]
MaxTimeFlag = Annotated[
    float | None, typer.Option(metavar="MINUTES", min=0.1, help="Begin no round of prompts that would end later.")
]
AllowQuantizedFlag = Annotated[
    bool, typer.Option("--allow-quantized-base", help="Take a base that is quantized itself, with a warning.")
]
KeepGoingFlag = Annotated[bool, typer.Option("--keep-going", help="Ask on when a check has failed.")]
ThreadsFlag = Annotated[
    int, typer.Option(min=0, envvar="QGUARD_THREADS", help="0 means all cores.", rich_help_panel=MEASURE)
]
ParallelFlag = Annotated[int, typer.Option(min=1, max=256, help="Answers generated side by side.", rich_help_panel=MEASURE)]
VerifyParallelFlag = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=256,
        help="Answers generated side by side. Default: 64, or 32 where their caches would take more than 1 GiB.",
        rich_help_panel=MEASURE,
    ),
]
GpuLayersFlag = Annotated[
    int, typer.Option("--n-gpu-layers", "-ngl", min=-1, help="Layers on the GPU; -1: all.", rich_help_panel=MEASURE)
]


def suites_from(names: str, files: Sequence[Path] | None, phrases: Sequence[str] | None) -> "tuple[Suite, ...]":
    """The suites of `--suites`, `--suite` and `--phrase`.

    Raises:
        SuiteError: an unknown name, or a file that is no suite.
    """
    from qguard_edge.verify.choose import choose_suites

    return choose_suites(names, files=files or (), phrases=phrases or ())


def texts_from(file: Path | None) -> tuple[str, ...]:
    """The texts of `--text`; empty: the built-in ones."""
    from qguard_edge.runtimes.fidelity import read_texts

    return tuple(read_texts(file)) if file else ()


def finish(found: "Verification", *, json_output: bool, quiet: bool, page: Path | None = None) -> None:
    """Show a verification, or write its JSON document, and end with the exit code of its verdict.

    Args:
        found: to show.
        json_output: write its document instead.
        quiet: show nothing.
        page: the HTML report that was written.
    """
    from qguard_edge.cli.verification_tables import show_verification
    from qguard_edge.verify.results import to_json

    if json_output:
        out.file.write(to_json(found))
    elif not quiet:
        show_verification(found)
        if command := more_prompts(found):
            out.print(f"    {command}", highlight=False, markup=False, soft_wrap=True)
        if page is not None:
            out.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)
        elif found.verdict.exit_code:
            out.print("report with the answers side by side: add --html FILE", highlight=False, markup=False)
    if found.verdict.exit_code:
        raise typer.Exit(found.verdict.exit_code)


def more_prompts(found: "Verification") -> str | None:
    """The command line of this process with as many prompts as would decide; None: they would not help, or all is decided."""
    from qguard_edge.verify.advice import prompts_to_ask
    from qguard_edge.verify.results import Verdict

    prompts = prompts_to_ask(found.checks) if found.verdict is Verdict.INCONCLUSIVE else None
    if prompts is None or len(sys.argv) < 2 or sys.argv[1] != "verify":
        return None
    kept, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word not in LIMITS and not word.startswith(tuple(f"{name}=" for name in LIMITS)):
            kept.append(word)
        skip = word in LIMITS
    return shlex.join(["qguard-edge", *kept, "--max-prompts", str(prompts)])
