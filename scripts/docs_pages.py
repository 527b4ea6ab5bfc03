"""The pages of the documentation that code writes, and the links between all of them; needs nothing but typer.

`scripts/docs_hook.py` gives them to mkdocs. A page is Markdown text; its name is a path below the site's root.
"""

import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FROM_THE_ROOT = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}
"""Page -> the document at the root of the repository that it shows."""
LINK = re.compile(r"(!?)\[([^\]\n]*(?:\n[^\]\n]*)?)\]\(([^)\s]+)\)")
SCHEMAS = ROOT / "qguard_edge" / "data" / "schemas"
TITLES = {"verify": "what `verify` and `check` write", "pack": "a baseline pack"}
"""What a schema describes, by the first part of its name."""


def anchor(heading: str, separator: str = "-") -> str:
    """The name that GitHub gives a heading; mkdocs gives it the same, so that one link holds in both."""
    return re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", separator)


def source_of(page: str) -> str:
    """The file of the repository that a page shows, as a path from its root."""
    return FROM_THE_ROOT.get(page, f"docs/{page}")


def relinked(markdown: str, page: str, repository: str | None) -> str:
    """A page with its links as the site has them.

    Args:
        markdown: as the document has it, its links relative to its place in the repository.
        page: its name in the site.
        repository: address of the repository's web page; None: links to what is no page become plain text.
    """
    here = posixpath.dirname(source_of(page))
    pages = {source: name for name, source in FROM_THE_ROOT.items()}

    def replaced(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        path, hash_mark, part = target.partition("#")
        if "://" in target or not path:
            return match.group()
        aim = posixpath.normpath(posixpath.join(here, path))
        name = pages.get(aim) or (aim.removeprefix("docs/") if aim.startswith("docs/") and "." in aim else None)
        if name:
            place = posixpath.relpath(name, posixpath.dirname(page) or ".")
            return f"{picture}[{text}]({place}{hash_mark}{part})"
        return f"[{text}]({repository}/blob/main/{aim})" if repository else text

    return LINK.sub(replaced, markdown)


def pages() -> dict[str, str]:
    """Every page that code writes: name and Markdown."""
    written = {
        "reference/commands.md": commands_page(),
        "reference/defenses.md": defenses_page(),
        "reference/types.md": types_page(),
        "reference/documents.md": documents_page(),
        "reference/api.md": api_page(),
    }
    return written | {name: (ROOT / source).read_text(encoding="utf-8") for name, source in FROM_THE_ROOT.items()}


def commands_page() -> str:
    """What `--help` says of every command."""
    from typer.main import get_command

    from qguard_edge.cli import app

    parts = [
        "# Commands",
        "Written from the code, as `qguard-edge COMMAND --help` is. `qguard-edge --version`, `--debug` (tracebacks and "
        "llama.cpp's log) and `--offline` (no model hub is asked) stand before the command. Exit codes: 0 pass, 1 negative "
        "verdict, 2 usage or operation failed, 3 inconclusive.",
    ]
    for name, command in _commands(get_command(app)):
        parts += [f"## qguard-edge {name}", (command.help or "").strip()]
        for panel, parameters in _panels(command).items():
            parts += [f"**{panel}**"] if panel else []
            rows = [_parameter(parameter) for parameter in parameters]
            parts.append(_table(("name", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        if inner is None:
            yield before + name, command
        else:
            yield from _commands(command, f"{before}{name} ")


def _panels(command: Any) -> dict[str, list[Any]]:
    """Parameters by the heading under which `--help` shows them, those without one first."""
    found: dict[str, list[Any]] = {"": []}
    for parameter in command.params:
        if not parameter.hidden:
            found.setdefault(parameter.rich_help_panel or "", []).append(parameter)
    return {panel: parameters for panel, parameters in found.items() if parameters}


def _parameter(parameter: Any) -> tuple[str, str, str]:
    flag = getattr(parameter, "is_flag", None)
    value = parameter.metavar or parameter.name.upper()
    if flag is None:  # an argument
        return f"`{value}`", "required" if parameter.required else "", parameter.help or ""
    name = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
    meaning, _, said = (parameter.help or "").partition(" [default: ")  # where the help text says it itself
    if parameter.required or said:
        default = "required" if parameter.required else f"`{said.removesuffix(']')}`"
    elif isinstance(parameter.show_default, str):
        default = parameter.show_default
    else:
        value_shown = parameter.show_default and not callable(parameter.default)
        hidden = not value_shown or parameter.default is None or parameter.default is False
        default = "" if hidden else f"`{parameter.default}`"
    meaning += f" Also `{parameter.envvar}`." if parameter.envvar else ""
    return name if flag else f"{name} `{value}`", default, meaning


def defenses_page() -> str:
    """Every defense with its options."""
    from qguard_edge.defenses.options import DEFAULT_DEFENSE, DEFENSE_OPTIONS

    parts = [
        "# Options of the defenses",
        "Written from the code, as `qguard-edge defenses` is. On the command line an option is `--NAME-OPTION`, in `compare`, "
        "`lab` and Python `NAME:OPTION=VALUE`. Which defense to take: [the defenses](../defenses.md).",
    ]
    for name, cls in DEFENSE_OPTIONS.items():
        parts += [f"## {name}", ("The default: " if name == DEFAULT_DEFENSE else "") + cls.summary + "."]
        rows = [_option(name, item) for item in fields(cls)]
        parts += [_table(("option", "default", "meaning"), rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def _option(defense: str, item: Any) -> tuple[str, str, str]:
    limits = item.metadata
    meaning = limits["help"]
    if choices := limits.get("choices"):
        meaning += f"; one of {', '.join(f'`{choice}`' for choice in choices)}"
    elif "minimum" in limits:
        meaning += f"; {limits['minimum']:g} to {limits['maximum']:g}"
    default = limits.get("shown", item.default if item.default is not MISSING else "")
    return f"`--{defense}-{item.name.replace('_', '-')}`", f"`{default}`", meaning


def types_page() -> str:
    """What `--to` accepts."""
    from convert.folder_targets import FOLDER_TARGETS
    from convert.ftypes import ALIASES, FILE_TYPES

    gguf = [
        (
            f"`{kind.name}`",
            ", ".join(f"`{alias}`" for alias, name in ALIASES.items() if name == kind.name),
            kind.main,
            "needed" if kind.needs_imatrix else "",
        )
        for kind in FILE_TYPES
    ]
    folders = [(f"`{target.name}`", target.main_type, target.summary) for target in FOLDER_TARGETS.values()]
    return "\n\n".join(
        (
            "# File types",
            "Written from the code. `qguard-edge types` also shows bits per weight and how the rounding of each is protected. "
            "In mixtures some tensors get another type.",
            _table(("--to", "also", "most tensors", "importance matrix"), gguf),
            "## Hugging Face folders for bitsandbytes",
            _table(("--to", "most weights", "what it is"), folders) + "\n",
        )
    )


def documents_page() -> str:
    """The JSON documents whose schema ships with the package."""
    parts = [
        "# JSON documents",
        "Written from the JSON schemas (draft 2020-12) in `qguard_edge/data/schemas`. Every document names its version; a field "
        "that changes its meaning raises it. Fields marked * may be missing.",
    ]
    for path in sorted(SCHEMAS.glob("*.json")):
        schema = json.loads(path.read_text(encoding="utf-8"))
        parts += [f"## {path.name}: {TITLES[path.stem.partition('-')[0]]}", *_object(schema)]
        for inner, definition in schema["$defs"].items():
            if "properties" in definition or "enum" in definition:
                parts += [f"### {inner} ({path.stem})", *_object(definition)]
    return "\n\n".join(parts) + "\n"


def _object(schema: Mapping[str, Any]) -> list[str]:
    """A definition: its first sentence, and its values or fields."""
    said, _, attributes = schema.get("description", "").partition("Attributes:\n")
    if "enum" in schema:
        return [said.strip(), f"One of {', '.join(f'`{value}`' for value in schema['enum'])}."]
    meanings = dict(re.findall(r"^\s*(\w+): (.*)$", attributes, re.MULTILINE))
    required = set(schema.get("required", ()))
    rows = [
        (f"`{field}`{'' if field in required else ' *'}", _type(kind), meanings.get(field, ""))
        for field, kind in schema["properties"].items()
    ]
    return [said.strip(), _table(("field", "type", "meaning"), rows)]


def _type(schema: Mapping[str, Any]) -> str:
    """The type of a field in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_type(choice) for choice in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return f"[{', '.join(_type(item) for item in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"name to {_type(schema['additionalProperties'])}"
    return str(schema.get("type", "any"))


def api_page() -> str:
    """The public names, for mkdocstrings to fill in from the docstrings."""
    import qguard_edge

    homes = {name: module for module, names in qguard_edge._CLASSES.items() for name in names.split()}
    public = [name for name in qguard_edge.__all__ if not name.startswith("__")]
    parts = [
        "# Python API",
        "Written from the docstrings of what `qguard_edge.__all__` names; import from `qguard_edge`. "
        "[From Python](../python.md) says how the pieces fit, and what may be relied on.",
        "## Functions",
    ]
    functions = [name for name in public if name[0].islower()]
    classes = [name for name in public if name[0].isupper()]
    parts += [f"::: {homes.get(name, 'qguard_edge.api')}.{name}" for name in functions]
    parts += ["## Classes", *(f"::: {homes[name]}.{name}" for name in classes)]
    return "\n\n".join(parts) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ("---",) * len(heads), *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text that stays in its cell and is no markup of HTML."""
    return " ".join(text.replace("<", "&lt;").replace("|", "\\|").split())
