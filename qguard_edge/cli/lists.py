"""Commands that list what there is: `qguard-edge defenses`."""

from dataclasses import fields

import typer

from qguard_edge.cli.console import JsonFlag, out, print_json, styled, table
from qguard_edge.defenses.options import DEFAULT_DEFENSE, DEFENSE_OPTIONS


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
        rows.add_row(styled("[bold]{name}[/]", name=name), "", "default" if name == DEFAULT_DEFENSE else "", cls.summary)
        for item in fields(cls):
            choices = item.metadata.get("choices")
            text = item.metadata["help"] + (f" ({' | '.join(map(str, choices))})" if choices else "")
            rows.add_row("", f"--{name}-{item.name.replace('_', '-')}", str(item.metadata.get("shown", item.default)), text)
        rows.add_section()
    out.print(rows)


def types(json_output: JsonFlag = False) -> None:
    """List the file types that `--to` accepts, and how the rounding of each is protected."""
    from convert.folder_targets import FOLDER_TARGETS
    from convert.ftypes import ALIASES, FILE_TYPES
    from quant_grids import GRIDS
    from quant_grids.ggml_type import layout_of, type_named

    listed = []
    for file_type in FILE_TYPES:
        main = type_named(file_type.main)
        layout = layout_of(main)
        assert layout is not None
        grid = GRIDS.get(main)
        listed.append(
            {
                "name": file_type.name,
                "aliases": [alias for alias, name in ALIASES.items() if name == file_type.name],
                "main_type": file_type.main,
                "bits_per_weight": round(layout[1] * 8 / layout[0], 4),
                "needs_imatrix": file_type.needs_imatrix,
                "protection": "not rounded" if file_type.base else grid.kind if grid else "none",
            }
        )
    folders = [
        {"name": t.name, "summary": t.summary, "main_type": t.main_type, "bits_per_weight": t.bits, "protection": "scalar"}
        for t in FOLDER_TARGETS.values()
    ]
    if json_output:
        print_json({"status": "ok", "types": listed, "folders": folders})
        return
    rows = table(
        "File types (mixtures give some tensors another type)", "name", "most tensors", ">bits", "imatrix", "protection"
    )
    for entry in listed:
        name = " = ".join([str(entry["name"]), *entry["aliases"]])  # type: ignore[misc]
        needs = "needed" if entry["needs_imatrix"] else ""
        rows.add_row(name, str(entry["main_type"]), f"{entry['bits_per_weight']:.2f}", needs, str(entry["protection"]))
    out.print(rows)
    more = table("Hugging Face folders for bitsandbytes", "name", "most weights", ">bits", "what it is")
    for folder in folders:
        bits = f"{folder['bits_per_weight']:.2f}" if folder["bits_per_weight"] else "-"
        more.add_row(str(folder["name"]), str(folder["main_type"]), bits, str(folder["summary"]))
    out.print(more)
    out.print("scalar: each weight's code is chosen; lattice: codes shared by 4 or 8 weights are chosen together")


def architectures(json_output: JsonFlag = False) -> None:
    """List the Hugging Face architectures that are converted: built in, and by llama.cpp's own converter once it is installed."""
    from gguf import MODEL_ARCH_NAMES

    from convert.hf.external import find_converter
    from convert.hf.families import INSTALL_FIRST, WAYS_OUT, built_in
    from convert.hf.foreign import architectures_of, runs_in_llama_cpp

    families = {family: MODEL_ARCH_NAMES[family.target] for family in built_in()}
    own = {name for family in families for name in family.architectures}
    script = find_converter()
    others = [one for one in architectures_of(script) if one.name not in own] if script else []
    runs = runs_in_llama_cpp({*families.values(), *(one.target for one in others)})
    listed = [
        {"family": family.title, "architectures": list(family.architectures), "llama_cpp": name, "runs": name in runs}
        for family, name in families.items()
    ]
    by_converter = [
        {"architecture": one.name, "llama_cpp": one.target or None, "runs": one.target in runs if one.target else None}
        for one in others
    ]
    if json_output:
        print_json({"status": "ok", "architectures": listed, "by_converter": by_converter})
        return
    said = {True: "yes", False: "no"}
    rows = table("Built-in architectures", "family", "architectures in config.json", "llama.cpp", "runs here")
    for family, name in families.items():
        rows.add_row(family.title, ", ".join(family.architectures), name, said[name in runs])
    out.print(rows)
    if script is None:
        out.print(f"Anything else: {INSTALL_FIRST}, {WAYS_OUT}", highlight=False)
        return
    more = table("By llama.cpp's own converter", "architecture in config.json", "llama.cpp", "runs here")
    for other in others:
        more.add_row(other.name, other.target or "?", said[other.target in runs] if other.target else "?")
    out.print(more)
    out.print(
        "runs here: the installed llama.cpp knows the name; docs/architectures.md says what was tried", highlight=False
    )


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("defenses")(defenses)
    app.command("types")(types)
    app.command("architectures")(architectures)
