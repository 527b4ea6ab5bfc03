"""Rows of a routed input, kept as they come in place of one Gram matrix for each expert: see `gram_files`.

Writing takes no memory to speak of, whatever the number of experts. What an expert saw is gathered when its matrix is wanted.
"""

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from qguard_edge.runtimes.gram_files import FloatArray, IntArray, read_array_file, write_array

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 1 << 20  # weights that are gathered at a time


class RowWriter:
    """Writes the rows of one pass.

    Args:
        stem: of the files, folder included.
        columns: of a row.
        slices: that they are routed to.
    """

    def __init__(self, stem: Path, columns: int, slices: int) -> None:
        self._stem, self._columns, self._slices = stem, columns, slices
        self._unfinished = stem.with_name(f"{stem.name}.rows.tmp")
        self._file: BinaryIO = self._unfinished.open("wb")
        self._routes: list[npt.NDArray[np.uint16]] = []
        self._numbers: list[IntArray] = []
        self._count = 0

    def add(self, rows: FloatArray, routes: npt.NDArray[np.int32]) -> None:
        """Add rows `[tokens, slots, columns]`, whose tokens go to the slices `routes` `[tokens, uses]`, one slot or all."""
        tokens, slots = rows.shape[:2]
        np.ascontiguousarray(rows).tofile(self._file)
        numbers = self._count + np.arange(tokens)[:, None] * slots + np.arange(routes.shape[1]) % slots
        self._routes.append(routes.astype(np.uint16).reshape(-1))
        self._numbers.append(numbers.astype(np.int32).reshape(-1))
        self._count += tokens * slots

    def finish(self) -> tuple[npt.NDArray[np.int64], FloatArray]:
        """Close the files and give them their names.

        Returns:
            Rows that each slice saw, int64 `[slices]`, and their sums of squares, f32 `[slices, columns]`.
        """
        self._file.close()
        routes = np.concatenate(self._routes) if self._routes else np.zeros(0, np.uint16)
        order = np.argsort(routes, kind="stable")
        numbers = np.concatenate(self._numbers)[order] if self._numbers else np.zeros(0, np.int32)
        counts = np.bincount(routes, minlength=self._slices)
        self._unfinished.replace(rows_file(self._stem))
        write_array(order_file(self._stem), numbers)
        kept = KeptRows(self._stem, self._columns, counts)
        squares = [kept.squares(index) for index in range(self._slices)]
        return counts, np.stack(squares)


def rows_file(stem: Path) -> Path:
    """Where the rows are."""
    return stem.with_name(f"{stem.name}.rows")


def order_file(stem: Path) -> Path:
    """Where it is said which slice saw which."""
    return stem.with_name(f"{stem.name}.order")


class KeptRows:
    """Reads what `RowWriter` wrote.

    Args:
        stem: of the files, folder included.
        columns: of a row.
        counts: rows that each slice saw.

    Raises:
        FormatError: the files are missing or cut off.
    """

    def __init__(self, stem: Path, columns: int, counts: npt.ArrayLike) -> None:
        self._ends = np.cumsum(np.asarray(counts, np.int64))
        self._order = read_array_file(order_file(stem), np.int32, (int(self._ends[-1]),))
        least = int(self._order.max()) + 1 if len(self._order) else 0
        self._rows = read_array_file(rows_file(stem), np.float32, (least, columns))
        self._columns = columns

    def gram(self, index: int) -> "Tensor":
        """The mean of `x x^T` over the rows that a slice saw, f32 `[columns, columns]`; zeros if it saw none."""
        import torch  # 110 MiB, which the process that writes does without

        chosen = self._of(index)
        total = torch.zeros(self._columns, self._columns)
        for part in self._parts(chosen):
            rows = torch.from_numpy(self._rows[part])
            total.addmm_(rows.T, rows)
        return total.div_(max(1, len(chosen)))

    def pooled(self) -> "Tensor":
        """As `gram`, over all slices together."""
        import torch

        uses = torch.from_numpy(np.bincount(self._order, minlength=len(self._rows)).astype(np.float32))
        total = torch.zeros(self._columns, self._columns)
        for part in self._parts(np.arange(len(self._rows))):
            rows = torch.from_numpy(self._rows[part])
            total.addmm_((rows * uses[part, None]).T, rows)
        return total.div_(max(1, len(self._order)))

    def squares(self, index: int) -> FloatArray:
        """Sums of squares of a slice, f32 `[columns]`."""
        total = np.zeros(self._columns)
        for part in self._parts(self._of(index)):
            rows = self._rows[part]
            total += np.einsum("ij,ij->j", rows, rows)
        return total.astype(np.float32)

    def _of(self, index: int) -> IntArray:
        end = int(self._ends[index])
        return self._order[int(self._ends[index - 1]) if index else 0 : end]

    def _parts(self, numbers: npt.NDArray[np.integer]) -> list[npt.NDArray[np.integer]]:
        step = max(1, AT_ONCE // self._columns)
        return [numbers[start : start + step] for start in range(0, len(numbers), step)]
