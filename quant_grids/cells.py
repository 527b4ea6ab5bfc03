"""Cells: for every weight the interval that the quantizer maps to one code, as long as the scale stays.

The other side of the grid. A defense chooses the code that a weight should have; an attack inside the rounding, and a
defense that moves the weights so that an unmodified quantizer picks the wanted codes, need the range in which a weight keeps
its code: half way to the neighbouring levels. The outermost levels have no neighbour; their cell is as wide outwards as it
is inwards.

What a quantizer derives from the weights, it derives anew once they have moved: the scale. Which weights set it is a matter
of the format (`scale_setters`):

* legacy types: the weight of largest magnitude of a block sets `d` (in the `_1` types smallest and largest set `d` and `m`);
* k-quants and IQ4: every sub-block has such weights of its own, and the sub-blocks with the largest scale and offset set `d`
  and `dmin` of the super-block, so all their weights count.

The k-quants also *search* for scales that fit all weights, so holding the setters is necessary there, not sufficient.
"""

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from quant_grids.base import ScalarGrid, Unpacked

_MIN_MAX_TYPES = {GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q5_1}
SEARCHED_TYPES = frozenset(
    {
        GGMLQuantizationType.Q2_K,
        GGMLQuantizationType.Q3_K,
        GGMLQuantizationType.Q4_K,
        GGMLQuantizationType.Q5_K,
        GGMLQuantizationType.Q6_K,
        GGMLQuantizationType.IQ4_NL,
        GGMLQuantizationType.IQ4_XS,
    }
)
"""Types whose scales llama.cpp searches for by error, instead of taking them from the largest weights."""


def cell_of(grid: ScalarGrid, parts: Unpacked) -> tuple[Tensor, Tensor, Tensor]:
    """Dequantized values and the edges of their cells, the midpoints to the neighbouring levels.

    Returns:
        value, low edge, high edge: each f32 `[n_sub_blocks, sub_size]`, low <= value <= high.
    """
    levels = torch.tensor(grid.levels)
    middle = (levels[1:] + levels[:-1]) / 2
    down = torch.cat((2 * levels[:1] - middle[:1], middle)) - levels
    up = torch.cat((middle, 2 * levels[-1:] - middle[-1:])) - levels
    codes = parts.codes.view(-1, grid.sub_size).long()
    scale = parts.scale.reshape(-1, 1)
    value = levels[codes] * scale
    if parts.offset is not None:
        value = value + parts.offset.reshape(-1, 1)
    one, other = value + down[codes] * scale, value + up[codes] * scale
    return value, torch.minimum(one, other), torch.maximum(one, other)


def _has_offset(grid: ScalarGrid, parts: Unpacked) -> bool:
    return parts.offset is not None or grid.ggml_type in _MIN_MAX_TYPES


def extent(grid: ScalarGrid, parts: Unpacked, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value that no weight of a sub-block may pass without setting its scale.

    Args:
        grid: of the blocks.
        parts: the blocks, taken apart.
        weights: f32 `[n_sub_blocks, sub_size]`, what they were quantized from.

    Returns:
        Two f32 `[n_sub_blocks, 1]`.
    """
    if _has_offset(grid, parts):
        return weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
    largest = weights.abs().amax(1, keepdim=True)
    return -largest, largest


def sub_block_setters(grid: ScalarGrid, parts: Unpacked, weights: Tensor) -> Tensor:
    """Bool `[n_sub_blocks, sub_size]`: the extreme weights of each sub-block. Arguments as for `extent`."""
    setters = torch.zeros_like(weights, dtype=torch.bool)
    if _has_offset(grid, parts):
        setters.scatter_(1, weights.argmax(1, keepdim=True), True)
        setters.scatter_(1, weights.argmin(1, keepdim=True), True)
    else:
        setters.scatter_(1, weights.abs().argmax(1, keepdim=True), True)
    return setters


def scale_setters(grid: ScalarGrid, parts: Unpacked, weights: Tensor) -> Tensor:
    """Bool `[n_sub_blocks, sub_size]`: weights that set a scale or an offset of any level. Arguments as for `extent`."""
    setters = sub_block_setters(grid, parts, weights)
    per_block = grid.block_size // grid.sub_size
    if per_block > 1:
        by_block = setters.view(-1, per_block, grid.sub_size)
        for numbers in (parts.scale, parts.offset):
            if numbers is not None:
                largest = numbers.abs().view(-1, per_block).argmax(1)
                by_block[torch.arange(len(by_block)), largest] = True
    return setters
