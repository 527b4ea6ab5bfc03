"""Options about the text of learned defenses, shared by `convert` and `plan`."""

from pathlib import Path
from typing import Annotated, Any

import typer

PANEL = "Text for calibrated defenses (feedback, quantguard, efrap)"


def calib_option() -> Any:
    """`--calib`."""
    return typer.Option(
        metavar="FILE",
        help="Text for calibrated defenses instead of the shipped mix: .txt, .jsonl, a folder, or 'self': the model writes it.",
        rich_help_panel=PANEL,
    )


def calib_add_option() -> Any:
    """`--calib-add`."""
    return typer.Option(
        metavar="FILE",
        help="Text that joins the shipped mix, about half and half: .txt, .jsonl or a folder.",
        rich_help_panel=PANEL,
    )


def calib_samples_option() -> Any:
    """`--calib-samples`."""
    return typer.Option(
        min=1,
        help="Texts (of the mix: rows) to learn on at most. Default: as many as make 24576 tokens; 128 if self-written.",
        rich_help_panel=PANEL,
    )


def calib_seqlen_option() -> Any:
    """`--calib-seqlen`."""
    return typer.Option(min=8, help="Tokens of each text at most.", rich_help_panel=PANEL)


def max_memory_option() -> Any:
    """`--max-memory`."""
    return typer.Option(
        metavar="SIZE",
        help="What may be used at most, such as 24GiB: with feedback, by all processes together, mapped files apart; with "
        "steps, by learning on its device, block by block if need be. Default: no limit.",
        rich_help_panel=PANEL,
    )


CalibFlag = Annotated[Path | None, calib_option()]
CalibAddFlag = Annotated[Path | None, calib_add_option()]
CalibSamplesFlag = Annotated[int | None, calib_samples_option()]
CalibSeqlenFlag = Annotated[int, calib_seqlen_option()]
MaxMemoryFlag = Annotated[str | None, max_memory_option()]
