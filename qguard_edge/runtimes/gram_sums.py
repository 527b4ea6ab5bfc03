"""Sums over a text of what chosen matrix products read: `x x^T` of every row x, and the squares on its diagonal.

The products go through BLAS' symmetric rank-k update straight from llama.cpp's memory: half the multiplications of `X^T X`, no
copy of X, and added to one triangle in f32. The other triangle is filled in at the end.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.linalg.blas import ssyrk

from qguard_edge.runtimes.ggml_tensor import GgmlLayoutError, GgmlTensor, operations, read_array, tensor_at
from qguard_edge.runtimes.gram_files import FloatArray, GramError, WantedWeight
from qguard_edge.runtimes.gram_passes import Unit
from qguard_edge.runtimes.graph_inputs import GraphInput, Key, key_of, weight_of
from qguard_edge.runtimes.kept_rows import RowWriter

MIRROR_BLOCK = 512


@dataclass
class Sums:
    """The sums of one unit.

    Attributes:
        unit: what is measured.
        rows: int64 `[count]`.
        squares: f64 `[count, columns]`.
        gram: f32 `[count, columns, columns]`, one triangle; None for squares alone, and where rows are kept.
        keeper: of the rows, where they are kept in place of Gram matrices; they are counted at the end.
    """

    unit: Unit
    rows: npt.NDArray[np.int64]
    squares: npt.NDArray[np.floating]
    gram: FloatArray | None
    keeper: RowWriter | None = None

    def add(self, index: int, rows: FloatArray) -> float:
        """Add the rows `[n, columns]` to slice `first + index`; returns the seconds of the products."""
        if not len(rows):
            return 0.0
        self.rows[index] += len(rows)
        if self.gram is None:
            self.squares[index] += np.einsum("ij,ij->j", rows, rows)
            return 0.0
        started = time.perf_counter()
        # BLAS thinks in columns: X^T as it lies in memory is [columns, n], and G, being symmetric, is its own transpose.
        target = self.gram[index].T
        made = ssyrk(1.0, np.ascontiguousarray(rows).T, beta=1.0, c=target, overwrite_c=1)
        assert np.shares_memory(made, target)
        return time.perf_counter() - started

    def finish(self) -> None:
        """Fill in the other triangle, and the squares from the diagonal or from the rows that were kept."""
        if self.keeper is not None:
            self.rows, self.squares = self.keeper.finish()
        if self.gram is None:
            return
        for index, gram in enumerate(self.gram):
            mirror(gram)
            self.squares[index] = gram.diagonal()

    def release(self) -> None:
        """Free what has been written."""
        self.gram, self.keeper = None, None
        self.squares = self.squares[:0].copy()


def mirror(gram: FloatArray) -> None:
    """Copy the lower triangle of `[n, n]` to the upper one, in place."""
    size = len(gram)
    for start in range(0, size, MIRROR_BLOCK):
        rows = slice(start, min(size, start + MIRROR_BLOCK))
        gram[:start, rows] = gram[rows, :start].T
        lower = np.tril(gram[rows, rows])
        gram[rows, rows] = lower + np.tril(lower, -1).T


def new_sums(unit: Unit, products: bool, keep: Path | None = None) -> Sums:
    """Sums that are zero.

    Args:
        unit: what is measured.
        products: Gram matrices, or the rows that they are made of; False: squares alone.
        keep: stem of the files that rows are kept in; None: Gram matrices.
    """
    columns, count = unit.columns, unit.count
    if keep is not None:
        nothing = np.zeros((0, columns), np.float32)
        return Sums(unit, np.zeros(count, np.int64), nothing, None, RowWriter(keep, columns, count))
    gram = np.zeros((count, columns, columns), np.float32) if products else None
    return Sums(unit, np.zeros(count, np.int64), np.zeros((count, columns), np.float64), gram)


@dataclass
class Watcher:
    """The evaluation callback of one pass. An error is kept in `error`, since none may be raised through C.

    Attributes:
        wanted: weights by name.
        inputs: all inputs that the survey found, in the order of the index.
        sums: of the units of this pass, in the order of the graph.
        copy: fetch every input through its backend.
        stop: leave out what a graph computes behind the last input of this pass. Not with several backends: each computes its
            piece of the graph, whatever became of the piece before.
        seconds: spent in here, and of that in products, by the clock and of the processor.
    """

    wanted: Mapping[str, WantedWeight]
    inputs: Sequence[GraphInput]
    sums: Sequence[Sums]
    copy: bool = False
    stop: bool = False
    error: Exception | None = None
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("callback", "products", "products_processor"), 0.0)
    )

    def __post_init__(self) -> None:
        self._by_owner = {self.inputs[sums.unit.position].owner: sums for sums in self.sums}
        self._owner_of = {name: found.owner for found in self.inputs for name in found.weights}
        self._repeated = {found.owner for found in self.inputs if found.uses > 1}
        self._keys: dict[str, Key] = {}
        last = self.inputs[self.sums[-1].unit.position]
        self.stop = self.stop and not self._repeated & self._by_owner.keys()
        self._last = last.owner if self.stop else ""
        # The last input is read where it is made, so that even its own product is left out: for the output matrix of a small
        # model that is a fifth of the work. Not before one graph has shown that the node of this name is what the product reads.
        self._producer = last.producer.encode() if self.stop else b""
        self._made = 0
        self._agreed = self._trusted = False

    def begin(self) -> None:
        """A new batch: forget the addresses of the graph before."""
        self._keys.clear()
        self._trusted = self._agreed

    def __call__(self, address: int, ask: bool) -> bool:
        """See `EvalCallback`."""
        started = time.perf_counter()
        try:
            return self.error is None and (self._wants(address) if ask else self._take(address))
        except Exception as error:
            self.error = error
            return False
        finally:
            self.seconds["callback"] += time.perf_counter() - started

    def _wants(self, address: int) -> bool:
        node = tensor_at(address)
        if self._producer and node.name == self._producer:
            self._made = address
            return self._trusted
        weight = weight_of(node, self.wanted)
        owner = self._owner_of.get(weight.name) if weight is not None else None
        if weight is None or owner is None:
            return False
        if weight.name == owner:
            self._keys[owner] = key_of(node, weight)
            if owner == self._last:
                self._agreed = node.src[1] == self._made
            return owner in self._by_owner
        if owner not in self._repeated and self._keys.get(owner) != key_of(node, weight):
            raise GramError(f"{weight.name} and {owner} shared an input at first and do not any more")
        return False

    def _take(self, address: int) -> bool:
        node = tensor_at(address)
        if self._producer and node.name == self._producer:
            self._add(self._by_owner[self._last], read_array(address, copy=self.copy))
            return False
        weight = weight_of(node, self.wanted)
        assert weight is not None
        sums = self._by_owner[weight.name]
        inputs = read_array(node.src[1], copy=self.copy)
        if node.op == operations().mul_mat_id:
            self._add_routed(sums, inputs, node)
        else:
            shape = tensor_at(node.src[0]).ne
            self._add(sums, inputs, (shape[2], shape[3]))
        return weight.name != self._last

    def _add(self, sums: Sums, inputs: FloatArray, stack: tuple[int, int] = (1, 1)) -> None:
        """Inputs `[ne3, ne2, ne1, columns]` of a product with a weight of `stack` = (ne2, ne3) matrices."""
        unit = sums.unit
        if stack == (1, 1):
            self._count(sums, 0, inputs.reshape(-1, unit.columns))
            return
        outer, inner = inputs.shape[:2]
        for i in range(outer):
            for j in range(inner):
                # ggml repeats the weight's matrices over the inputs': each serves a run of neighbours.
                owner = i // (outer // stack[1]) * stack[0] + j // (inner // stack[0])
                if unit.first <= owner < unit.first + unit.count:
                    self._count(sums, owner - unit.first, inputs[i, j])

    def _count(self, sums: Sums, index: int, rows: FloatArray) -> None:
        """Add rows, and what they cost."""
        before = time.process_time()
        self.seconds["products"] += sums.add(index, rows)
        self.seconds["products_processor"] += time.process_time() - before

    def _add_routed(self, sums: Sums, inputs: FloatArray, node: GgmlTensor) -> None:
        """Each row goes to the experts that the routes name."""
        unit = sums.unit
        routes = read_array(node.src[2], copy=self.copy)[0, 0]  # [tokens, slots]
        rows = inputs[0]  # [tokens, slots or 1, columns]
        if len(routes) != len(rows) or routes.min() < 0 or routes.max() >= self.inputs[unit.position].slices:
            raise GgmlLayoutError(f"the routes of {self.inputs[unit.position].owner} do not fit its inputs")
        if sums.keeper is not None:
            sums.keeper.add(rows, routes)
            return
        for index in range(unit.count):
            tokens, slots = np.nonzero(routes == unit.first + index)
            self._count(sums, index, rows[tokens, slots % rows.shape[1]])
