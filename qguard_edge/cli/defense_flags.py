"""Turn the defenses' option classes into command-line options: `--ortho-target`, `--ortho-width`, ...

Typer reads a command's options from its signature, so the signature is extended with one keyword per option field; the
command receives them in `**flags` and hands them to `options_from`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, get_type_hints

import typer

from qguard_edge.defenses.options import DEFENSE_OPTIONS, DefenseOptions, options_class
from quant_grids.errors import UnsupportedError


def _keyword(defense: str, field_name: str) -> str:
    return f"{defense}_{field_name}"


def with_defense_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add every defense's options to a command that takes `**flags`."""
    signature = inspect.signature(command)
    kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    added = []
    for defense, cls in DEFENSE_OPTIONS.items():
        hints = get_type_hints(cls)
        for item in fields(cls):
            choices = item.metadata.get("choices")
            text = item.metadata["help"] + (f" [{'|'.join(map(str, choices))}]" if choices else "")
            default = "" if item.default is MISSING else f" [default: {item.metadata.get('shown', item.default)}]"
            flag = typer.Option(
                f"--{defense}-{item.name.replace('_', '-')}",
                help=text + default,
                rich_help_panel=f"Options of --defense {defense}",
                show_default=False,
            )
            added.append(
                inspect.Parameter(
                    _keyword(defense, item.name),
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[hints[item.name] | None, flag],
                )
            )
    command.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    return command


def given_for(defense: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of one defense, for commands that take several."""
    mine = {_keyword(defense, item.name) for item in fields(options_class(defense))}
    return {name: value for name, value in flags.items() if name in mine}


def options_from(defense: str, flags: Mapping[str, Any]) -> DefenseOptions:
    """The chosen defense's options, from the flags that were given.

    Raises:
        UnsupportedError: no such defense, a value outside its limits, or a flag of another defense.
    """
    cls = options_class(defense)
    given = {name: value for name, value in flags.items() if value is not None}
    mine = {_keyword(defense, item.name): item.name for item in fields(cls)}
    for name in given:
        if name not in mine:
            owner, _, field_name = name.partition("_")
            flag = f"--{owner}-{field_name.replace('_', '-')}"
            raise UnsupportedError(f"{flag} belongs to --defense {owner}, but --defense {defense} was chosen")
    options = cls(**{mine[name]: value for name, value in given.items()})
    options.check()
    return options
