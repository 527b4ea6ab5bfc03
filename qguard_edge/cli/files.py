"""`qguard-edge inspect` and `qguard-edge diff`: look into finished files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convert.sizes import size_text
from qguard_edge.cli.console import ConsoleProgress, JsonFlag, count_text, out, percent, print_json, styled, table

if TYPE_CHECKING:
    from convert.diff import FileDifference

INSPECT_HELP = """Show a GGUF's types, sizes and qguard metadata.

Example:

    qguard-edge inspect model-Q4_K_M.gguf
"""

DIFF_HELP = """Show what differs between two GGUFs of the same layout.

With -v per tensor: codes changed, by how many levels at most, bytes that are not code bits, and with --base the alignment.
Exits with 1 when anything but code bits and qguard.* metadata differs.

Example:

    qguard-edge diff model.plain.gguf model.gguf --base model-bf16.gguf
"""


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .gguf file (first shard of a split one).")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json_output: JsonFlag = False,
) -> None:
    """Replaced by INSPECT_HELP when the command is registered."""
    from convert.inspection import inspect_gguf, summary_document
    from quant_grids import GRIDS

    model = inspect_gguf(file)
    groups: dict[str, list[Any]] = {}
    for tensor in model.tensors:
        groups.setdefault(tensor.ggml_type.name, []).append(tensor)
    if json_output:
        print_json(summary_document(model))
        return
    shards = f", {model.shards} shards" if model.shards > 1 else ""
    out.print(
        f"{model.file}: {model.name}, architecture {model.architecture}, {count_text(model.n_weights)} weights, "
        f"{size_text(model.n_bytes)}{shards}",
        highlight=False,
        markup=False,
    )
    rows = table("Tensor types", "type", ">tensors", ">weights", ">bytes", ">share", "grid")
    for type_name, group in sorted(groups.items(), key=lambda item: -sum(t.n_bytes for t in item[1])):
        weights, n_bytes = sum(t.n_weights for t in group), sum(t.n_bytes for t in group)
        grid = GRIDS.get(group[0].ggml_type)
        kind = grid.kind if grid else "-"
        rows.add_row(
            type_name, str(len(group)), count_text(weights), size_text(n_bytes), percent(weights / model.n_weights), kind
        )
    out.print(rows)
    if model.qguard:
        rows = table("qguard metadata", "key", "value")
        for key, value in model.qguard.items():
            rows.add_row(f"qguard.{key}", str(value))
        out.print(rows)
    else:
        out.print("no qguard metadata: this file was not made by qguard-edge")
    if tensors:
        rows = table("Tensors", "name", "shape", "type", ">bytes")
        for tensor in model.tensors:
            rows.add_row(tensor.name, " x ".join(map(str, tensor.shape)), tensor.ggml_type.name, size_text(tensor.n_bytes))
        out.print(rows)


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="For instance the plain file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="For instance the hardened file.")],
    base: Annotated[Path | None, typer.Option(help="Full-precision GGUF both were made from; adds the alignment.")] = None,
    every: Annotated[
        bool,
        typer.Option("--verbose", "-v", "--all", help="List every tensor; else those with more than code bits changed."),
    ] = False,
    json_output: JsonFlag = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the exit code.")] = False,
) -> None:
    """Replaced by DIFF_HELP when the command is registered."""
    from convert.diff import difference_document
    from qguard_edge import api

    with ConsoleProgress(quiet) as progress:
        found = api.diff(first, second, base=base, progress=progress)
    if json_output:
        print_json(difference_document(found))
    elif not quiet:
        _show_diff(found, every)
    if not found.only_code_bits:
        raise typer.Exit(1)


def _show_diff(found: "FileDifference", every: bool) -> None:
    """The conclusion first; then metadata and tensors that differ in more than codes, or with `every` all tensors."""
    verdict = "only code bits differ" if found.only_code_bits else "more than code bits differs"
    if found.only_code_bits and found.codes_changed == 0:
        verdict = "the tensors are identical"
    colour = "default" if found.only_code_bits else "red"
    weights = sum(t.n_weights for t in found.tensors)
    touched = sum(1 for t in found.tensors if t.codes_changed)
    text = (
        f"[{colour}]{verdict.capitalize()}[/]: {found.codes_changed} codes changed ({percent(found.codes_changed / weights)}) in "
        f"{touched} of {len(found.tensors)} tensors"
    )
    out.print(styled(text), highlight=False)
    for key in found.metadata:
        out.print(styled("[red]metadata differs:[/] {key}", key=key), highlight=False)
    if found.qguard_metadata:
        out.print(f"qguard metadata differs: {', '.join(found.qguard_metadata)}", highlight=False)
    shown = [t for t in found.tensors if every or t.foreign_bytes]
    if not shown:
        if found.codes_changed:
            out.print("-v lists every tensor", style="dim", highlight=False)
        return
    rows = table("Tensors", "name", "type", ">codes changed", ">share", ">largest step", ">other bytes", ">alignment")
    for tensor in shown:
        rows.add_row(
            tensor.name,
            tensor.ggml_type.name,
            str(tensor.codes_changed),
            percent(tensor.codes_changed / tensor.n_weights),
            str(tensor.largest_step),
            styled("[red]{count}[/]", count=tensor.foreign_bytes) if tensor.foreign_bytes else "0",
            "-" if tensor.alignment is None else f"{tensor.alignment:.3f}",
        )
    out.print(rows)


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("inspect", help=INSPECT_HELP)(inspect)
    app.command("diff", help=DIFF_HELP)(diff)
