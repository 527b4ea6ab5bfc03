"""A folder of Gram matrices: what a source writes and `qguard_edge.runtimes.grams.Grams` reads. Needs numpy alone.

    index.json      which weights share which input, and where its sums are
    NAME.squares    f32 [slices, columns]           sums of x_j^2 over the rows x that were seen
    NAME.gram       f32 [slices, columns, columns]  mean of x x^T over these rows, both triangles
    NAME.rows       f32 [rows, columns]             in its place, the rows themselves, and
    NAME.order      i32 [uses]                      numbers of the rows that each slice saw, slice after slice

Experts keep rows where these are fewer than their matrices have: there are as many as the text has tokens (times the experts that
a token goes to, where each has a row of its own), however many experts there are.

A *slice* is an expert of a mixture, or one matrix of a stack; an ordinary weight has one. Slices that did not fit into memory
together lie in several pieces. The index is written after every pass over the text, so a folder is always whole: a source that
was killed goes on behind the last pass.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from quant_grids.errors import FormatError, QGuardError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
Number = TypeVar("Number", np.float32, np.int32)
INDEX = "index.json"
VERSION = 3


class GramError(QGuardError):
    """No Gram matrices can be had, or one is asked for that is not there."""


@dataclass(frozen=True)
class WantedWeight:
    """A weight whose inputs are to be seen.

    Attributes:
        name: of the tensor in the GGUF.
        columns: length of a row.
        slices: experts, or matrices of a stack; 1 for an ordinary matrix.
    """

    name: str
    columns: int
    slices: int = 1


@dataclass(frozen=True)
class GramPiece:
    """Some slices of an input's sums.

    Attributes:
        stem: of the files' names.
        first: the first slice.
        rows: rows of activations seen, per slice.
    """

    stem: str
    first: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class MeasuredInput:
    """An input that one or several weights share.

    Attributes:
        weights: their names, in the order of the graph.
        columns: length of an activation.
        slices: experts, or matrices of a stack.
        routed: each row went to some of the slices only.
        pieces: where the sums are.
        kept_rows: how many rows are kept in place of Gram matrices, if each weight is used once; 0: none.
    """

    weights: tuple[str, ...]
    columns: int
    slices: int
    routed: bool
    pieces: tuple[GramPiece, ...] = ()
    kept_rows: int = 0

    @property
    def memory(self) -> int:
        """Bytes that the sums of one slice take while they are added up."""
        return 0 if self.kept_rows else 4 * self.columns**2

    @property
    def disk(self) -> int:
        """Bytes of all slices' files."""
        return 4 * self.columns * (self.slices + (self.kept_rows or self.slices * self.columns))

    @property
    def measured(self) -> int:
        """Slices that have their sums."""
        return sum(len(piece.rows) for piece in self.pieces)


@dataclass(frozen=True)
class GramIndex:
    """Everything in a folder.

    Attributes:
        job: identifies model, text and weights.
        products: whether there are Gram matrices, or the sums of squares alone.
        inputs: what was seen.
        skipped: weights that were used in a way that gives no Gram matrix, with the reason.
        missing: weights that no product used.
        figures: seconds, tokens and bytes, for reports.
    """

    job: str
    products: bool
    inputs: tuple[MeasuredInput, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be measured."""
        return all(entry.measured == entry.slices for entry in self.inputs)

    def save(self, folder: Path) -> None:
        """Write the index; it replaces an older one in one step."""
        temporary = folder / (INDEX + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"version": VERSION, **asdict(self)}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / INDEX)


def load_index(folder: Path) -> GramIndex | None:
    """The index of a folder; None where there is none.

    Raises:
        FormatError: it is none of this version's.
    """
    path = folder / INDEX
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            raise FormatError(f"{path} is of another version; delete the folder and measure again")
        inputs = tuple(
            MeasuredInput(
                tuple(entry["weights"]),
                entry["columns"],
                entry["slices"],
                entry["routed"],
                tuple(GramPiece(p["stem"], p["first"], tuple(p["rows"])) for p in entry["pieces"]),
                entry["kept_rows"],
            )
            for entry in content.pop("inputs")
        )
        return GramIndex(inputs=inputs, missing=tuple(content.pop("missing")), **content)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise FormatError(f"{path} cannot be read ({type(error).__name__}); delete the folder and measure again") from error


def fewer_rows(rows: int, columns: int, slices: int) -> int:
    """Rows to keep of a routed input that has so many in all; 0 where its Gram matrices are smaller."""
    return rows if rows <= slices * columns else 0


def write_array(path: Path, values: FloatArray | IntArray) -> None:
    """Write f32 or i32 values, so that the file is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        values.tofile(file)
    temporary.replace(path)


def read_slices(path: Path, shape: tuple[int, ...], first: int, count: int) -> FloatArray:
    """`count` slices from the `first` on: f32 `[count, *shape]`, mapped: pages of the file until they are written to.

    Raises:
        FormatError: the file is missing or too short.
    """
    return read_array_file(path, np.float32, (count, *shape), 4 * first * int(np.prod(shape, dtype=np.int64)))


def read_array_file(path: Path, kind: type[Number], shape: tuple[int, ...], offset: int = 0) -> npt.NDArray[Number]:
    """An array of four-byte numbers in a file, mapped as above.

    Raises:
        FormatError: the file is missing or too short.
    """
    size = 4 * int(np.prod(shape, dtype=np.int64))
    try:
        if path.stat().st_size < offset + size:
            raise FormatError(f"{path.name} is cut off; delete the folder and measure again")
        if size == 0:  # nothing can be mapped
            return np.zeros(shape, kind)
        # "c": what a caller changes is its own, and never reaches the file.
        return np.memmap(path, kind, "c", offset=offset, shape=shape).view(np.ndarray)
    except OSError as error:
        raise FormatError(f"cannot read {path.name}: {error.strerror}") from error
