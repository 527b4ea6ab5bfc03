"""The walk for rules that know what each matrix is fed: matrix after matrix, the next one prepared while this one is rounded.

Per matrix (for a stack of experts: per expert) its Gram matrix is factored once, for all matrices that share the inputs; the rule
settles what it needs on a sample of rows; then slices of whole rows run on the pool. Slices do not depend on the number of
threads, nor on the device, and each has random numbers of its own. `room` says what is held in memory at a time.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from convert.tensor_io import RowSlice
from qguard_edge.defenses.base import Defense, Inputs, JoinedKey, MatrixRule, Rounded, SliceKey
from qguard_edge.rounding.room import KEPT_FACTORS, SAMPLE_ROWS, SAMPLE_RUNS, SLICE_ARRAYS, SLICE_WEIGHTS, Room
from quant_grids import Grid, Outcome

TWICE_ROWS = 24
TWICE_STREAM = 1 << 21  # of `share_between_seeds`
FIT_STREAM = 1 << 20  # number of the stream of random numbers that a rule is settled with; slices count from 0
JOINED_WEIGHTS = 1 << 26
"""On a GPU, slices are rounded together: what takes time there is the number of steps, not their length."""


@dataclass(frozen=True)
class MatrixWork:
    """One matrix to round.

    Attributes:
        name: of its tensor.
        expert: of a stack; 0 elsewhere.
        grid: of its format.
        columns: of a row.
        first: its first row in the tensor.
        rows: how many.
        read: blocks and full-precision weights of some rows of the tensor.
        key: random numbers of a slice.
        sink: receives the new blocks of a slice; called from several threads.
    """

    name: str
    expert: int
    grid: Grid
    columns: int
    first: int
    rows: int
    read: Callable[[RowSlice], tuple[Tensor, Tensor]]
    key: Callable[[RowSlice], SliceKey]
    sink: Callable[[RowSlice, Tensor], None]

    def slices(self, weights: int = SLICE_WEIGHTS) -> list[RowSlice]:
        """Slices of whole rows, as equal as may be; numbered so that no two of a tensor share random numbers."""
        count = max(1, -(-self.rows * self.columns // weights))
        step = -(-self.rows // count)
        starts = range(self.first, self.first + self.rows, step)
        return [RowSlice(start, start, min(start + step, self.first + self.rows)) for start in starts]

    def sample(self) -> tuple[Tensor, Tensor]:
        """Blocks and weights of runs of rows spread over the matrix; of all rows if there are few."""
        if self.rows <= SAMPLE_RUNS * SAMPLE_ROWS:
            return self.read(RowSlice(0, self.first, self.first + self.rows))
        last = self.rows - SAMPLE_ROWS
        starts = [self.first + last * i // (SAMPLE_RUNS - 1) for i in range(SAMPLE_RUNS)]
        runs = [self.read(RowSlice(0, start, start + SAMPLE_ROWS)) for start in starts]
        return torch.cat([blocks for blocks, _ in runs]), torch.cat([weights for _, weights in runs])


@dataclass(frozen=True)
class Rounding:
    """What became of one matrix; `differing`: how many of its codes another seed is expected to choose otherwise."""

    outcome: Outcome
    bits: float
    seconds: float
    differing: float


@dataclass
class _Factors:
    """The last factors made, by the inputs they belong to."""

    defense: Defense[Any]
    inputs: Inputs | None
    most: int = KEPT_FACTORS
    kept: OrderedDict[tuple[str, int, int], Any] = field(default_factory=OrderedDict)

    def of(self, matrix: MatrixWork, device: torch.device) -> Any:
        if self.inputs is None or matrix.name not in self.inputs.names:
            return self.defense.factor(matrix.grid, None, matrix.columns, device)
        name = (min(self.inputs.shares(matrix.name)), matrix.expert, matrix.grid.weights_per_code)
        if name not in self.kept:
            while len(self.kept) >= self.most:
                self.kept.popitem(last=False)
            gram = self.inputs.of(matrix.name, matrix.expert).to(device)
            self.kept[name] = self.defense.factor(matrix.grid, gram, matrix.columns, device)
        self.kept.move_to_end(name)
        return self.kept[name]


def in_order_of_inputs(matrices: Sequence[MatrixWork], inputs: Inputs | None) -> list[MatrixWork]:
    """Matrices that read the same inputs one after the other, so that their factor is made once: expert 0 of gate and up, ...

    Args:
        matrices: in the order of the file.
        inputs: what is known of them.
    """
    known = set(inputs.names) if inputs is not None else set()
    first: dict[str, int] = {}
    places = []
    for number, matrix in enumerate(matrices):
        owner = min(inputs.shares(matrix.name)) if inputs is not None and matrix.name in known else matrix.name
        places.append((first.setdefault(owner, number), matrix.expert, number))
    return [matrices[number] for _, _, number in sorted(places)]


def share_between_seeds(grid: Grid, rule: MatrixRule, blocks: Tensor, weights: Tensor, key: SliceKey) -> float:
    """Share of the codes in which two seeds differ, from a few rows that are rounded twice with independent draws.

    The probabilities of one run do not tell: 2 p (1 - p) of each draw, summed, leaves out that the draws before it moved the
    centre, and the second run's elsewhere. Two passes over the same rows are two runs, so what they differ in has no bias.

    Args:
        grid: of the format.
        rule: settled for the matrix.
        blocks: uint8 `[n_blocks, type_size]`, plain, the rows of the sample.
        weights: f32 `[rows, columns]`, full precision.
        key: selects the random numbers.
    """
    if not rule.draws:
        return 0.0
    chosen = slice(None, None, max(1, len(weights) // TWICE_ROWS))
    some = blocks.view(len(weights), -1, blocks.shape[1])[chosen].repeat(2, 1, 1).flatten(0, 1)
    rounded = rule.round(some, weights[chosen].repeat(2, 1), key)
    first, second = rounded.blocks.chunk(2)
    return grid.changed_codes(first, second)[0] / weights[chosen].numel()


def round_matrices(
    matrices: Sequence[MatrixWork],
    defense: Defense[Any],
    inputs: Inputs | None,
    pool: ThreadPoolExecutor,
    device: torch.device,
    room: Room | None = None,
) -> Iterator[Rounding]:
    """Round matrices one after the other.

    Args:
        matrices: in an order that keeps those with the same inputs near each other.
        defense: with `wants_inputs`.
        inputs: what is known of them; None: nothing.
        pool: the threads that slices are spread over.
        device: where the arithmetic runs.
        room: what may be held in memory; its threads are those of the pool.
    """
    room = room or Room(1)
    factors = _Factors(defense, inputs, room.kept)

    def prepare(matrix: MatrixWork) -> tuple[MatrixRule, float]:
        with torch.inference_mode():
            blocks, weights = matrix.sample()
            key = replace(matrix.key(RowSlice(0, matrix.first, matrix.first)), index=FIT_STREAM + matrix.expert)
            rule = defense.on(matrix.grid).fit(matrix.grid, factors.of(matrix, device), blocks, weights, key)
            twice = replace(key, index=TWICE_STREAM + matrix.expert)
            return rule, share_between_seeds(matrix.grid, rule, blocks, weights, twice)

    def decide(matrix: MatrixWork, rule: MatrixRule, parts: Sequence[RowSlice]) -> Rounded:
        with torch.inference_mode():
            whole = RowSlice(parts[0].index, parts[0].start, parts[-1].stop)
            blocks, weights = matrix.read(whole)
            keys = [matrix.key(part) for part in parts]
            joined = JoinedKey(tuple(keys), tuple(part.stop - part.start for part in parts))
            rounded = rule.round(blocks, weights, keys[0] if len(keys) == 1 else joined)
            matrix.sink(whole, rounded.blocks)
            return rounded

    started = time.perf_counter()
    waiting: Future[tuple[MatrixRule, float]] | None = None
    for number, matrix in enumerate(matrices):
        rule, share = (waiting or pool.submit(prepare, matrix)).result()
        parts = [pool.submit(decide, matrix, rule, some) for some in _joined(matrix, device)]
        waiting = pool.submit(prepare, matrices[number + 1]) if room.ahead and number + 1 < len(matrices) else None
        total, bits = Outcome(0, 0.0, 0.0, 0.0), 0.0
        for part in parts:
            rounded = part.result()
            total, bits = total + rounded.outcome, bits + rounded.bits
        del rule, parts, part  # their factor is not kept while the next one is made
        now = time.perf_counter()
        yield Rounding(total, bits, now - started, share * matrix.rows * matrix.columns)
        started = now


def _joined(matrix: MatrixWork, device: torch.device) -> list[list[RowSlice]]:
    """Slices that are rounded in one go: each by itself, but on a GPU as many as it has good use for."""
    slices, step = matrix.slices(), 1
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] // (8 * SLICE_ARRAYS)  # half of it
        step = max(1, min(JOINED_WEIGHTS, free) // SLICE_WEIGHTS)
    return [slices[i : i + step] for i in range(0, len(slices), step)]
