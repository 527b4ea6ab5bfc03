"""Where weights lie in their quantization cells.

The **position** of a weight is its distance from the level it rounds to, in units of the cell: 0 on the level, 0.5 on the wall
to the next. Sides are folded together. A weight that was not placed on purpose lies anywhere in its cell with almost the same
probability, whatever the weights' distribution, because a cell is narrow and folding cancels the slope: the histogram is flat.
It is exactly flat in theory for no real model, and flat within a few percent for all we have seen (`limits`).

Two ways to find the cells:

* *closed form*: types whose scale is the largest magnitude of a block or row. Nothing needs to be quantized.
* *blocks*: from the blocks that llama.cpp wrote, for any scalar type. k-quants search for their scales, and choose them
  so that errors become small: their histogram falls towards the wall, also on clean models.

**Resolution.** A bf16 weight has 8 significant bits: 40 levels from zero it is only known to a third of a cell. So a weight
counts only if its own rounding is finer than `RESOLUTION` of a cell; scales stored as fp16 blur cells far from zero in
the same way. Weights that set a scale, and those beyond the outermost levels, never count.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from quant_grids.base import ScalarGrid, UniformGrid
from quant_grids.bnb import BLOCK, INT8_STEP, LARGEST_HALF, bnb_grid
from quant_grids.legacy import LegacyGrid

BINS = 100
RESOLUTION = 0.01
CLOSED_FORM = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "int8", "nf4", "fp4")
SIGNIFICANT_BITS = {"f32": 24, "f16": 11, "bf16": 8}
HALF_BITS = 11  # of the fp16 scales in every GGUF type

Positions = tuple[Tensor, Tensor]
"""Folded position of each weight in [0, 0.5], f32, and where it counts, bool of the same shape."""


def histogram(positions: Positions) -> Tensor:
    """int64 `[BINS]`: weights that count, by position."""
    place, counts = positions
    # Bin 0 collects what does not count; a position of exactly 0.5 belongs to the last place.
    bins = (place.reshape(-1) * (2 * BINS)).int().clamp_(max=BINS - 1).add_(1).mul_(counts.reshape(-1))
    return torch.bincount(bins, minlength=BINS + 1)[1:]


def reach_of(precision: str) -> float:
    """How many levels from zero a weight of this precision may lie for its position to be known well enough."""
    bits = min(SIGNIFICANT_BITS[precision], HALF_BITS)
    return RESOLUTION * 2.0**bits


def closed_form(kind: str, columns: int) -> Callable[[Tensor, str], Positions] | None:
    """The function from weights `[rows, columns]` and their precision to positions; None if the shape does not fit the type."""
    if kind == "int8":
        return _int8
    block = BLOCK if kind in ("nf4", "fp4") else 32
    if columns % block:
        return None
    if kind in ("nf4", "fp4"):
        return functools.partial(_four_bit, kind)
    return functools.partial(_with_offset if kind in ("q4_1", "q5_1") else _legacy, kind)


def _legacy(kind: str, weights: Tensor, precision: str) -> Positions:
    """Q4_0, Q5_0, Q8_0: the weight of largest magnitude of 32 becomes the outermost level."""
    runs = weights.view(-1, 32)
    high, low = runs.amax(1, keepdim=True), runs.amin(1, keepdim=True)
    if kind == "q8_0":
        outermost, largest = 127.0, torch.maximum(high, -low)
    else:
        outermost, largest = {"q4_0": -8.0, "q5_0": -16.0}[kind], torch.where(high > -low, high, low)
    inverse = 1.0 / (largest / outermost).half().float()
    return _on_integers(runs * inverse.nan_to_num_(0.0, 0.0, 0.0), min(abs(outermost) - 0.5, reach_of(precision)))


def _int8(weights: Tensor, precision: str) -> Positions:
    """LLM.int8: the largest magnitude of a row, after the cast to fp16, becomes 127."""
    step = weights.half().abs().amax(1, keepdim=True).float().clamp_(max=LARGEST_HALF) * INT8_STEP
    inverse = (1.0 / step).nan_to_num_(0.0, 0.0, 0.0)
    return _on_integers(weights * inverse, min(126.5, reach_of(precision)))


def _on_integers(place: Tensor, reach: float) -> Positions:
    """Positions among levels at the integers; `place` may be overwritten."""
    size = place.abs()
    counts = (size < reach) & (size > 0)
    return size.sub_(size.round()).abs_(), counts


def _with_offset(kind: str, weights: Tensor, precision: str) -> Positions:
    """Q4_1, Q5_1: smallest and largest of 32 become the outermost levels."""
    last = 15.0 if kind == "q4_1" else 31.0
    runs = weights.view(-1, 32)
    low = runs.amin(1, keepdim=True)
    scale = ((runs.amax(1, keepdim=True) - low) / last).half().float()
    inverse = (1.0 / scale).nan_to_num_(0.0, 0.0, 0.0)
    place = (runs - low.half().float()) * inverse
    counts = ((runs * inverse).abs() < reach_of(precision)) & (place > 0.5) & (place < last - 0.5) & (runs != 0)
    return place.sub_(place.round()).abs_(), counts


def _four_bit(kind: str, weights: Tensor, precision: str) -> Positions:
    """NF4, FP4: the largest magnitude of 64 becomes 1; a cell reaches from midpoint to midpoint of its uneven levels."""
    walls, slope, start = _cells(kind)
    runs = weights.view(-1, BLOCK)
    inverse = (1.0 / runs.abs().amax(1, keepdim=True)).nan_to_num_(0.0, 0.0, 0.0)
    place = (runs * inverse).view(-1)
    code = torch.bucketize(place, walls, out_int32=True)
    steep = slope.index_select(0, code)
    position = torch.addcmul(start.index_select(0, code), place, steep).abs_()
    counts = (position <= 0.5) & (place != 0)
    if SIGNIFICANT_BITS[precision] < HALF_BITS:
        counts &= steep.mul_(place).abs_() < RESOLUTION * 2.0 ** SIGNIFICANT_BITS[precision]
    return position, counts


@functools.cache
def _cells(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Walls between the levels, and for each level the line `start + slope * weight` from -0.5 to 0.5 across its cell.

    The outermost levels have a wall on one side only; their line stays beyond 0.5, so that they do not count.
    """
    levels = torch.tensor(bnb_grid(kind, BLOCK).levels)
    walls = (levels[1:] + levels[:-1]) / 2
    slope = 1.0 / walls.diff()
    start = -walls[:-1] * slope - 0.5
    outside = torch.tensor([2.0])
    return walls, torch.cat((outside * 0, slope, outside * 0)), torch.cat((outside, start, outside))


def from_blocks(grid: ScalarGrid, blocks: Tensor, weights: Tensor, precision: str) -> Positions:
    """Positions in the cells of blocks that llama.cpp wrote.

    Args:
        grid: of the blocks' type.
        blocks: uint8 `[n_blocks, type_size]`.
        weights: f32 of as many elements.
        precision: of the checkpoint.
    """
    parts = grid.unpack(blocks)
    place, square = grid.position(parts, weights)
    codes = parts.codes.view(place.shape)
    last = len(grid.levels) - 1
    narrowest = float(grid.level_table(place.device).diff().min())
    far = weights.view(place.shape).abs() >= reach_of(precision) * narrowest * square.sqrt()
    counts = (codes > 0) & (codes < last) & (square > 0) & ~far & (weights.view(place.shape) != 0)
    distance = grid.levels_of(codes).sub_(place)
    if not isinstance(grid, UniformGrid):
        # Uneven levels: in units of the way to the wall on the weight's side.
        gap = grid.level_table(codes.device).diff()
        up = torch.cat((gap, gap[-1:]))[codes.long()]
        down = torch.cat((gap[:1], gap))[codes.long()]
        distance /= torch.where(distance < 0, up, down)
    elif isinstance(grid, LegacyGrid) and parts.offset is None:
        counts &= place.abs() < max(abs(grid.levels[0]), abs(grid.levels[-1])) - 0.5  # the weight that sets the scale
    distance.abs_()
    return distance, counts & (distance <= 0.5)
