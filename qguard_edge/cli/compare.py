"""`qguard-edge compare`: the price of each defense on the user's own model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from qguard_edge.cli.console import ConsoleProgress, JsonFlag, out, percent, print_json, table
from qguard_edge.cli.defense_flags import given_for, options_from, with_defense_flags
from qguard_edge.cli.outputs import OverwriteFlag, hold, model_exists

HELP = """Convert MODEL with several defenses and compare what each costs in fidelity, in llama.cpp.

This is the utility side of the choice. Whether a defense stops a backdoor needs a backdoored model: see `qguard-edge lab`.

Example:

    qguard-edge compare ./model --to q4_k --defenses none,feedback,ortho --text my.txt --plot compare.svg
"""


@with_defense_flags
def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or full-precision .gguf.")],
    to: Annotated[str, typer.Option("--to", metavar="TYPE", help="llama.cpp file type.")],
    defenses: Annotated[str, typer.Option(help="Comma-separated names, or all: the data-free ones and feedback.")] = "all",
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 texts separated by empty lines. Default: a short built-in set."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Plot KL against alignment (.svg or .png).")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each text at most.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every defense.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0 means all cores.")] = 0,
    overwrite: OverwriteFlag = False,
    json_output: JsonFlag = False,
    **flags: Any,
) -> None:
    """Replaced by HELP when the command is registered."""
    model_exists(model)
    from qguard_edge.defenses.options import DATA_FREE, DEFAULT_DEFENSE

    names = [*DATA_FREE, DEFAULT_DEFENSE] if defenses == "all" else [name.strip() for name in defenses.split(",")]
    chosen = [options_from(name, given_for(name, flags)) for name in names]

    from convert.ftypes import parse_file_type
    from convert.quantizer import QuantizeOptions
    from qguard_edge.compare.defenses import compare_defenses
    from qguard_edge.conversion.request import GgufRequest
    from qguard_edge.runtimes.fidelity import DEFAULT_TEXT, read_texts

    hold({"--plot": plot}, (model, text, imatrix), overwrite=overwrite)
    options = QuantizeOptions(parse_file_type(to), threads=threads, imatrix=imatrix)
    request = GgufRequest(model=model, options=options, defense=chosen[0], revision=revision, seed=seed)
    with ConsoleProgress(json_output) as progress:
        rows = compare_defenses(request, chosen, read_texts(text or DEFAULT_TEXT), max_tokens=max_tokens, progress=progress)
    if plot:
        from qguard_edge.compare.plot import plot_compare

        plot_compare(rows, f"{Path(model).name}, {options.file_type.name}", plot)
    if json_output:
        listed = [{"defense": row.defense.name, **asdict(row), "params": asdict(row.defense)} for row in rows]
        for entry, row in zip(listed, rows, strict=True):
            entry["defense"] = row.defense.name
        drawn = {"plot": plot.name} if plot else {}
        print_json({"status": "ok", "file_type": options.file_type.name, "seed": seed, "rows": listed, **drawn})
        return
    shown = table(
        f"{Path(model).name} as {options.file_type.name}: distance to full precision on {rows[0].fidelity.n_tokens} tokens",
        "defense", ">flipped", ">alignment", ">mean KL (95%)", ">99.9% KL", ">same top", ">ppl ratio", ">s",
    )  # fmt: skip
    for row in rows:
        measured = row.fidelity
        low, high = measured.mean_kl_interval
        shown.add_row(
            row.defense.name,
            percent(row.share_flipped),
            f"{row.alignment:.2f}",
            f"{measured.mean_kl:.4f} ({low:.4f}-{high:.4f})",
            f"{measured.kl_999:.2f}",
            percent(measured.same_top),
            f"{measured.perplexity_ratio:.3f}",
            f"{row.seconds:.1f}",
        )
    out.print(shown)
    if plot:
        out.print(f"wrote {plot}", highlight=False, markup=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compare", help=HELP)(compare)
