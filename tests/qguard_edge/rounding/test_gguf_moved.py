"""Weights moved into the cells of the chosen codes, against libggml's rounding."""

import pytest
import torch
from gguf import GGMLQuantizationType

from qguard_edge.rounding.gguf_moved import move_into_cells
from quant_grids import GRIDS
from quant_grids.base import ScalarGrid
from quant_grids.cells import cell_of, sub_block_setters
from tests.helpers.ggml_oracle import quantize as quantize_in_libggml


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_cells_hold_their_level_and_moved_weights_lie_inside(name: str) -> None:
    grid = GRIDS[GGMLQuantizationType[name]]
    assert isinstance(grid, ScalarGrid)
    weights = torch.randn(8, 512, generator=torch.Generator().manual_seed(5))
    blocks = torch.from_numpy(quantize_in_libggml(grid.ggml_type, weights.numpy())).view(-1, grid.type_size)
    flips = grid.flips(blocks, weights)
    flipped, _ = grid.apply(blocks, flips, (flips.ratio > 0.3).float())
    moved, chosen, movable = move_into_cells(grid, blocks, flipped, weights)
    value, low, high = cell_of(grid, grid.unpack(flipped))
    assert bool(((low < value) & (value < high)).all())
    inside = (moved.view(low.shape) > low) & (moved.view(low.shape) < high)
    assert bool(inside[movable.view(low.shape)].all())
    assert bool((movable <= chosen).all())
    held = sub_block_setters(grid, grid.unpack(blocks), weights.view(-1, grid.sub_size)).view(weights.shape)
    assert torch.equal(moved[held], weights[held])
