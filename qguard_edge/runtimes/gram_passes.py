"""Passes over the text: which sums fit into memory together, and what is written when a pass is done."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qguard_edge.runtimes.gram_files import FloatArray, GramError, GramIndex, GramPiece, load_index, write_array


@dataclass(frozen=True)
class Unit:
    """Some slices of one input, measured in one pass.

    Attributes:
        position: of the input in the index.
        columns: of the input.
        first: the first slice.
        count: of slices.
    """

    position: int
    columns: int
    first: int
    count: int


def stem_of(unit: Unit) -> str:
    """What the names of a unit's files begin with."""
    return f"{unit.position:05d}-{unit.first:04d}"


def resumed(index: GramIndex, folder: Path) -> GramIndex:
    """The index with the pieces that an earlier run of the same job has left in the folder."""
    old = load_index(folder)
    if old is None or old.job != index.job:
        return index
    done = {entry.weights: entry.pieces for entry in old.inputs}
    inputs = (dataclasses.replace(entry, pieces=done.get(entry.weights, ())) for entry in index.inputs)
    return dataclasses.replace(index, inputs=tuple(inputs))


def forget_others(folder: Path, key: str) -> None:
    """Remove what another job has left in the folder."""
    index = load_index(folder)
    if index is not None and index.job != key:
        for path in folder.iterdir():
            if path.suffix in (".gram", ".squares", ".rows", ".order", ".json", ".tmp"):
                path.unlink()


def require_disk(index: GramIndex, folder: Path) -> None:
    """Refuse a folder whose disk is too small for what is still to be measured, before minutes are spent on it.

    Raises:
        GramError: it is.
    """
    left = [entry for entry in index.inputs if entry.measured < entry.slices]
    squares = sum(4 * entry.columns * entry.slices for entry in left)
    need = sum(entry.disk * (entry.slices - entry.measured) // entry.slices for entry in left) if index.products else squares
    free = shutil.disk_usage(folder).free
    if need > free:
        raise GramError(
            f"the Gram matrices take {need >> 20} MiB of disk beside the output, where {free >> 20} MiB are free; free some, or "
            "name an output on a larger disk"
        )


def plan_passes(index: GramIndex, budget: int | None) -> list[list[Unit]]:
    """Cut what is still to be measured into passes, in the order of the inputs.

    Args:
        index: with what is measured already.
        budget: bytes for Gram matrices; None: no limit.

    Raises:
        GramError: a single matrix is larger than the budget.
    """
    passes: list[list[Unit]] = []
    left = 0
    for position, entry in enumerate(index.inputs):
        each = entry.memory if index.products else 0
        if budget is not None and each > budget:
            raise GramError(
                f"the Gram matrix of {entry.weights[0]} takes {each >> 20} MiB, and of the memory that is allowed "
                f"{max(0, budget) >> 20} MiB are left for it; raise --max-memory by {((each - budget) >> 20) + 1} MiB"
            )
        first = entry.measured
        while first < entry.slices:
            count = entry.slices - first
            if budget is not None and each:
                count = min(count, left // each)
            if count == 0 or not passes:
                passes.append([])
                left = budget or 0
                continue
            passes[-1].append(Unit(position, entry.columns, first, count))
            left -= each * count
            first += count
    return passes


def written(
    index: GramIndex,
    folder: Path,
    unit: Unit,
    rows: npt.NDArray[np.int64],
    squares: FloatArray,
    gram: FloatArray | None,
) -> GramIndex:
    """Write what one unit saw; returns the index with it, which is not saved yet.

    Args:
        index: of the folder.
        folder: gets the files.
        unit: what was measured.
        rows: int64 `[count]`, how many rows each slice saw.
        squares: f32 `[count, columns]`.
        gram: f32 `[count, columns, columns]`, sums, or None (rows that are kept are there already); divided by the rows in place.

    Raises:
        GramError: the sums are not finite.
    """
    entry = index.inputs[unit.position]
    if not np.isfinite(squares).all():
        raise GramError(f"the inputs of {entry.weights[0]} are not finite numbers: the model is broken")
    stem = stem_of(unit)
    write_array(folder / f"{stem}.squares", squares.astype(np.float32, copy=False))
    if gram is not None:
        for values, count in zip(gram, rows, strict=True):
            values /= max(1, int(count))
        write_array(folder / f"{stem}.gram", gram.astype(np.float32, copy=False))
    piece = GramPiece(stem, unit.first, tuple(int(count) for count in rows))
    inputs = list(index.inputs)
    inputs[unit.position] = dataclasses.replace(entry, pieces=(*entry.pieces, piece))
    return dataclasses.replace(index, inputs=tuple(inputs))
