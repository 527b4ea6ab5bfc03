"""Options about the text of learned defenses, shared by `convert` and `plan`."""

from pathlib import Path
from typing import Annotated

import typer

PANEL = "Text for learned defenses (quantguard, efrap)"

CalibFlag = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text for learned defenses instead of the shipped mix: .txt, .jsonl, a folder, or 'self': the model writes it.",
        rich_help_panel=PANEL,
    ),
]
CalibAddFlag = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text that joins the shipped mix, about half and half: .txt, .jsonl or a folder.",
        rich_help_panel=PANEL,
    ),
]
CalibSamplesFlag = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Texts (of the mix: rows) to learn on at most. Default: as many as make 32768 tokens; 128 if self-written.",
        rich_help_panel=PANEL,
    ),
]
CalibSeqlenFlag = Annotated[int, typer.Option(min=8, help="Tokens of each text at most.", rich_help_panel=PANEL)]
MaxMemoryFlag = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What learning may use on its device, such as 24GiB; goes block by block if need be. Default: no limit.",
        rich_help_panel=PANEL,
    ),
]
