"""Boxes against libggml: what stays inside rounds to the same codes."""

import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from qguard_edge.lab import bnb
from qguard_edge.lab.attacks.boxes import Box, Boxes, BoxRule, cut_box
from qguard_edge.lab.attacks.elq import four_bit_box, int8_box
from quant_grids import GRIDS
from quant_grids.base import ScalarGrid
from quant_grids.cells import cell_of
from tests.helpers import ggml_oracle

LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
# IQ4_NL fits one fp16 scale per block to all its weights: nothing can be frozen that would hold it, every value moves a little.
FITTED = ("IQ4_NL",)


def _grid(name: str) -> ScalarGrid:
    grid = GRIDS[GGMLQuantizationType[name]]
    assert isinstance(grid, ScalarGrid)
    return grid


def _quantize(name: str, weights: Tensor) -> Tensor:
    blocks = ggml_oracle.quantize(GGMLQuantizationType[name], weights.numpy())
    return torch.from_numpy(blocks).view(-1, _grid(name).type_size)


def _weights(rows: int = 64, columns: int = 512, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _anywhere_in(box: Box, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return box.low + (box.high - box.low) * torch.rand(box.low.shape, generator=generator)


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_boxes_keep_every_byte(name: str) -> None:
    weights = _weights()
    reference = _quantize(name, weights)
    box = cut_box(_grid(name), reference, weights, BoxRule("cell", reach=0.99))
    assert bool(((box.low <= weights) & (weights <= box.high)).all())
    for moved in (_anywhere_in(box, 1), box.low, box.high):
        again = _quantize(name, moved)
        assert torch.equal(again, reference)


@pytest.mark.parametrize("name", LEGACY + SEARCHED + FITTED)
def test_a_weight_in_its_cell_is_nearest_to_its_code(name: str) -> None:
    """With the scales as stored, any point of the box rounds to the code that is stored, whatever the format."""
    grid, weights = _grid(name), _weights(8)
    reference = _quantize(name, weights)
    box = cut_box(grid, reference, weights, BoxRule("cell", reach=0.98))
    parts = grid.unpack(reference)
    levels = grid.level_table(torch.device("cpu"))
    _, square = grid.position(parts, weights)
    _, low, high = cell_of(grid, parts)
    flat = weights.reshape(-1, grid.sub_size)
    honest = ((flat > low) & (flat < high)).view_as(weights)  # the quantizer took the nearest level
    for moved in (box.low, box.high):
        position, _ = grid.position(parts, moved)
        nearest = (position.unsqueeze(-1) - levels).abs().argmin(-1).view_as(weights)
        usable = (square > 0).expand(-1, grid.sub_size).reshape(weights.shape) & honest
        assert torch.equal(nearest[usable], parts.codes.view_as(weights)[usable].long())


@pytest.mark.parametrize("name", SEARCHED)
def test_error_boxes_mostly_keep_searched_scales(name: str) -> None:
    """Moving weights towards their dequantized values leaves most values as they were; it is a heuristic, hence the share."""
    grid, weights = _grid(name), _weights()
    reference = _quantize(name, weights)
    box = cut_box(grid, reference, weights, BoxRule("error", reach=0.9))
    again = grid.dequantize(_quantize(name, _anywhere_in(box, 1)))
    before = grid.dequantize(reference)
    kept = float((again == before).float().mean())
    wide = cut_box(grid, reference, weights, BoxRule("cell", reach=0.9))
    kept_wide = float((grid.dequantize(_quantize(name, _anywhere_in(wide, 1))) == before).float().mean())
    assert kept > kept_wide
    assert kept > 0.5


@pytest.mark.parametrize("kind", bnb.KINDS)
def test_bitsandbytes_boxes_keep_every_value(kind: str) -> None:
    weight = _weights(32, 128)
    box = int8_box(weight) if kind == "int8" else four_bit_box(weight, kind)
    before = bnb.dequantized(weight, kind)
    assert torch.equal(bnb.dequantized(_anywhere_in(box, 1), kind), before)
    assert float((box.high > box.low).float().mean()) > 0.9


def test_projection_and_intersection() -> None:
    one = Boxes({"w": Box(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]))})
    other = Boxes({"w": Box(torch.tensor([0.5, 2.0]), torch.tensor([3.0, 3.0]))})
    one.intersect(other)
    assert one.by_parameter["w"].low.tolist() == [0.5, 1.0]
    assert one.by_parameter["w"].high.tolist() == [1.0, 1.0]
    parameter = {"w": torch.tensor([-1.0, 5.0])}
    one.project(parameter)
    assert parameter["w"].tolist() == [0.5, 1.0]
