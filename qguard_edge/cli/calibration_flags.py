"""Options about the text of learned defenses, shared by `convert` and `plan`."""

from pathlib import Path
from typing import Annotated, Any

import typer

PANEL = "Text for learned defenses (quantguard, efrap)"


def calib_option() -> Any:
    """`--calib`."""
    return typer.Option(
        metavar="FILE",
        help="Text for learned defenses: .txt, .jsonl or a folder. Default: the model writes its own.",
        rich_help_panel=PANEL,
    )


def calib_samples_option() -> Any:
    """`--calib-samples`."""
    return typer.Option(
        min=1,
        help="Texts to learn on at most. Default: as many as make 32768 tokens; 128 if the model writes them.",
        rich_help_panel=PANEL,
    )


def calib_seqlen_option() -> Any:
    """`--calib-seqlen`."""
    return typer.Option(min=8, help="Tokens of each text at most.", rich_help_panel=PANEL)


def max_memory_option() -> Any:
    """`--max-memory`."""
    return typer.Option(
        metavar="SIZE",
        help="What learning may use on its device, such as 24GiB; goes block by block if need be. Default: no limit.",
        rich_help_panel=PANEL,
    )


CalibFlag = Annotated[Path | None, calib_option()]
CalibSamplesFlag = Annotated[int | None, calib_samples_option()]
CalibSeqlenFlag = Annotated[int, calib_seqlen_option()]
MaxMemoryFlag = Annotated[str | None, max_memory_option()]
