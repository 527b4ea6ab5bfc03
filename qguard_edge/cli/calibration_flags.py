"""Options about the text of learned defenses, shared by `convert` and `plan`."""

from pathlib import Path
from typing import Annotated

import typer

PANEL = "Text for learned defenses (quantguard, efrap)"

CalibFlag = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text for learned defenses: .txt, .jsonl or a folder. Default: the model writes its own.",
        rich_help_panel=PANEL,
    ),
]
CalibSamplesFlag = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Texts to learn on at most. Default: as many as make 32768 tokens; 128 if the model writes them.",
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
