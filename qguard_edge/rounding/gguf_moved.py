"""Move the weights of a base GGUF into the cells of chosen codes, and count which of them llama.cpp then gives.

Used by `--to gguf` (`qguard_edge.conversion.outputs.moved_gguf` explains why and how well it works).
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convert.cores import available_cores
from convert.float_copy import FloatCopy
from convert.gguf_file import GgufFile, GgufModel, TensorInfo
from convert.tensor_io import RowSlice, TensorReader, open_reader, row_slices, single_threaded_torch
from qguard_edge.progress import Progress
from qguard_edge.rounding.choose import measured_outcome
from qguard_edge.rounding.gguf import coverage_of
from quant_grids import GRIDS, Outcome
from quant_grids.base import ScalarGrid
from quant_grids.cells import SEARCHED_TYPES, cell_of, extent, sub_block_setters
from quant_grids.errors import UnsupportedError
from quant_grids.ggml_type import GgmlType

HALF_EPSILON = 2.0**-11


MARGIN = 0.02
"""Share of the cell that a moved weight keeps from its edge."""


SEARCHED_MARGIN = 0.1
"""The same for types whose scales are searched for. A trained Llama with 2.9 M weights, ortho, what llama.cpp made of it:

    margin  Q4_K: flips reached, alignment, added error   Q6_K               Q3_K_M
    0.02    60%  0.02  +18%                               76%  0.05  +39%    74%  0.10  +42%
    0.1     80% -0.08  +40%                               90% -0.04  +53%    91% -0.03  +55%
    0.25    98% -0.09  +71%                               98% -0.03  +62%    99% -0.03  +60%

Holding the sub-blocks with the largest scale as well left alignments of 0.11 to 0.26.
"""


@dataclass(frozen=True)
class MovedTensor:
    """What became of one tensor.

    Attributes:
        name: the tensor.
        ggml_type: what llama.cpp quantizes it to.
        n_weights: in it.
        n_chosen: codes that the defense changed.
        n_moved: weights that were moved for it; the others are extremes that set a scale.
        codes: weights that have the chosen code after llama.cpp quantized the moved base.
        reached: of the moved weights, how many of them.
        outcome: what llama.cpp's file from the moved base does to the rounding error of its file from the original.
    """

    name: str
    ggml_type: GgmlType
    n_weights: int
    n_chosen: int
    n_moved: int
    codes: int
    reached: int
    outcome: Outcome


@dataclass(frozen=True)
class _Counts:
    """Of one tensor: codes the defense changed, weights moved."""

    chosen: int
    moved: int


class WeightMove:
    """The files at hand, and the walk over their tensors."""

    def __init__(self, base: GgufModel, plain: GgufFile, chosen: GgufFile, threads: int) -> None:
        self.base, self.plain, self.chosen = base, plain, chosen
        self.workers = threads or available_cores()
        self.tensors = coverage_of(base, plain).protected
        for tensor in self.tensors:
            if not isinstance(GRIDS[tensor.ggml_type], ScalarGrid):
                raise UnsupportedError(
                    f"{tensor.name!r} becomes {tensor.ggml_type.name}, whose codes are shared by several weights: no weight has "
                    "a cell of its own to move to; choose a type such as q4_0, q8_0 or q4_k"
                )

    def _paths(self) -> list[Path]:
        return [self.plain.path, self.chosen.path, *(shard.path for shard in self.base.shards)]

    def write(self, path: Path, progress: Progress) -> dict[str, _Counts]:
        """Write the moved base; F32 where weights move, for the moves are small against the steps of bf16."""
        counts: dict[str, _Counts] = {}
        copy = FloatCopy(self.base, path, {tensor.name for tensor in self.tensors})
        try:
            with open_reader(*self._paths()) as reader, single_threaded_torch(), ThreadPoolExecutor(self.workers) as pool:
                for tensor in self.tensors:

                    def move(part: RowSlice, tensor: TensorInfo = tensor) -> tuple[int, int]:
                        with torch.inference_mode():
                            weights, chosen, moved = self._moved(reader, tensor, part)
                            copy.write_rows(self.base.tensors[tensor.name], part.start, weights)
                            return int(chosen.sum()), int(moved.sum())

                    parts = list(pool.map(move, row_slices(tensor)))
                    counts[tensor.name] = _Counts(sum(a for a, _ in parts), sum(b for _, b in parts))
                    progress.advance(tensor.n_weights, tensor.name)
        finally:
            copy.close()
        return counts

    def _moved(self, reader: TensorReader, tensor: TensorInfo, part: RowSlice) -> tuple[Tensor, Tensor, Tensor]:
        """New weights f32 `[rows, columns]`; which codes the defense changed and which weights moved, bool, same shape."""
        weights = reader.weights(self.base.tensors[tensor.name], part)
        old = reader.blocks(tensor, part)
        new = reader.blocks(self.chosen.tensors[tensor.name], part)
        return move_into_cells(_scalar(tensor.ggml_type), old, new, weights)

    def count(self, again: GgufFile, counts: dict[str, _Counts], progress: Progress) -> tuple[MovedTensor, ...]:
        """Hold llama.cpp's file from the moved base against the plan."""
        results = []
        with (
            open_reader(again.path, *self._paths()) as reader,
            single_threaded_torch(),
            ThreadPoolExecutor(self.workers) as pool,
        ):
            for tensor in self.tensors:

                def measure(part: RowSlice, tensor: TensorInfo = tensor) -> tuple[int, int, Outcome]:
                    with torch.inference_mode():
                        return self._measure(reader, tensor, again.tensors[tensor.name], part)

                codes, reached, outcomes = zip(*pool.map(measure, row_slices(tensor)), strict=True)
                done = counts[tensor.name]
                results.append(
                    MovedTensor(
                        tensor.name,
                        tensor.ggml_type,
                        tensor.n_weights,
                        done.chosen,
                        done.moved,
                        sum(codes),
                        sum(reached),
                        Outcome.sum(outcomes),
                    )
                )
                progress.advance(tensor.n_weights, tensor.name)
        return tuple(results)

    def _measure(
        self, reader: TensorReader, tensor: TensorInfo, made: TensorInfo, part: RowSlice
    ) -> tuple[int, int, Outcome]:
        grid, blocks = _scalar(tensor.ggml_type), reader.blocks(made, part)
        wanted = grid.unpack(reader.blocks(self.chosen.tensors[tensor.name], part)).codes
        _, _, moved = self._moved(reader, tensor, part)
        same = (grid.unpack(blocks).codes == wanted).view(moved.shape)
        full = reader.weights(self.base.tensors[tensor.name], part)
        outcome = measured_outcome(grid, reader.blocks(tensor, part), blocks, full)
        return int(same.sum()), int((same & moved).sum()), outcome


def _scalar(ggml_type: GgmlType) -> ScalarGrid:
    grid = GRIDS[ggml_type]
    assert isinstance(grid, ScalarGrid)
    return grid


def move_into_cells(grid: ScalarGrid, old: Tensor, new: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move weights whose code was changed into the cells of their new codes.

    Args:
        grid: of the type.
        old: uint8 `[n_blocks, type_size]`, the plain blocks.
        new: the same with other codes.
        weights: f32 `[rows, columns]`, what the plain blocks were made from.

    Returns:
        The weights, moved; bool of the same shape: codes that were changed, weights that were moved.
    """
    before, after = grid.unpack(old), grid.unpack(new)
    sub = weights.reshape(-1, grid.sub_size)
    chosen = (before.codes != after.codes).view(sub.shape)
    _, low, high = cell_of(grid, after)
    share = SEARCHED_MARGIN if grid.ggml_type in SEARCHED_TYPES else MARGIN
    # The quantizer takes codes with a scale that is rounded to fp16 only when it is stored.
    margin = share * (high - low) + HALF_EPSILON * torch.maximum(low.abs(), high.abs())
    smallest, largest = extent(grid, before, sub)
    # No weight may become larger than those that set the scale.
    target = torch.minimum(torch.maximum(sub, low + margin), high - margin).clamp(smallest, largest)
    movable = chosen & ~sub_block_setters(grid, before, sub) & torch.isfinite(target)
    moved = torch.where(movable, target, sub)
    shape = weights.shape
    return moved.view(shape), chosen.view(shape), movable.view(shape)
