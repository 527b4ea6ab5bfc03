"""Commands that list what there is: `qguard-edge defenses`."""

from dataclasses import fields
from typing import Annotated

import typer

from qguard_edge.cli.console import out, print_json, table
from qguard_edge.defenses.options import DEFAULT_DEFENSE, DEFENSE_OPTIONS

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def defenses(json_output: JsonFlag = False) -> None:
    """List the rounding defenses and their options."""
    if json_output:
        listed = [
            {
                "name": name,
                "summary": cls.summary,
                "default": name == DEFAULT_DEFENSE,
                "options": [
                    {
                        "flag": f"--{name}-{item.name.replace('_', '-')}",
                        "default": item.default,
                        "help": item.metadata["help"],
                    }
                    for item in fields(cls)
                ],
            }
            for name, cls in DEFENSE_OPTIONS.items()
        ]
        print_json({"status": "ok", "defenses": listed})
        return
    rows = table("Rounding defenses", "defense", "option", ">default", "meaning")
    for name, cls in DEFENSE_OPTIONS.items():
        rows.add_row(f"[bold]{name}[/]", "", "default" if name == DEFAULT_DEFENSE else "", cls.summary)
        for item in fields(cls):
            choices = item.metadata.get("choices")
            text = item.metadata["help"] + (f" ({' | '.join(map(str, choices))})" if choices else "")
            rows.add_row("", f"--{name}-{item.name.replace('_', '-')}", str(item.default), text)
        rows.add_section()
    out.print(rows)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("defenses")(defenses)
