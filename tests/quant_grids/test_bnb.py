"""NF4, FP4 and LLM.int8 against bitsandbytes itself, bit for bit."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from quant_grids.base import ScalarFlips
from quant_grids.bnb import BLOCK, BNB_KINDS, FP4, NF4, FourBitGrid, Int8Grid, bnb_grid
from quant_grids.bnb_scales import compress_scales, dynamic_map
from quant_grids.errors import FormatError, UnsupportedError

# bitsandbytes compiles its own kernels for odd shapes, which takes 20 seconds and changes nothing.
torch.compiler.set_stance("force_eager")

SHAPES = [(3, 64), (5, 192), (7, 33), (1, 63), (2, 65), (9, 100), (64, 576), (1, 1), (33, 1)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def matrix(shape: tuple[int, int], kind: str = "random", seed: int = 0) -> Tensor:
    """Weights of a kind that has broken quantizers before."""
    weights = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "zeros":
        weights.zero_()
    elif kind == "zero rows":
        weights[::2] = 0
        weights.view(-1)[: weights.numel() // 3] = 0
    elif kind == "outliers":
        weights[0] *= 1000
        weights[-1, -1] = 60.0
    elif kind == "ties":
        weights = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)) / 4.0
    elif kind == "tiny":
        weights *= 1e-6
    return weights


KINDS_OF_WEIGHTS = ["random", "zeros", "zero rows", "outliers", "ties", "tiny"]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_code_books(name: str) -> None:
    grid = bnb_grid(name, BLOCK)
    assert isinstance(grid, FourBitGrid)
    assert torch.equal(torch.tensor(grid.code_book), bnb.get_4bit_type(name, device="cpu"))


def test_dynamic_map() -> None:
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", KINDS_OF_WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bits(name: str, shape: tuple[int, int], what: str, dtype: torch.dtype) -> None:
    weights = matrix(shape, what).to(dtype)
    grid = bnb_grid(name, shape[1])
    blocks = grid.quantize(weights)
    packed, state = bnb.quantize_4bit(weights, quant_type=name)
    assert torch.equal(grid.scales(blocks), state.absmax)
    ours = grid.field(blocks, "qs").reshape(-1)[: packed.numel()]
    theirs = packed.view(-1).clone()
    if weights.numel() % 2:  # the last nibble belongs to no weight
        ours = ours.clone()
        ours[-1] &= 0xF0
        theirs[-1] &= 0xF0
    assert torch.equal(ours, theirs)
    state.dtype = torch.float32
    values = grid.dequantize(blocks).view(-1)[: weights.numel()].view(shape)
    assert torch.equal(values, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", KINDS_OF_WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8(shape: tuple[int, int], what: str, dtype: torch.dtype) -> None:
    weights = matrix(shape, what).to(dtype)
    grid = bnb_grid("int8", shape[1])
    blocks = grid.quantize(weights)
    codes, scales, _ = bnb.int8_vectorwise_quant(weights.half())
    assert torch.equal(grid.scales(blocks), scales)
    alive = scales > 0  # bitsandbytes divides zero by zero in a row of zeros; what that gives as an integer is undefined
    assert torch.equal(grid.field(blocks, "qs").view(torch.int8)[alive], codes[alive])
    assert torch.equal(grid.dequantize(blocks)[alive], bnb.int8_vectorwise_dequant(codes, scales)[alive])
    assert not grid.dequantize(blocks)[~alive].any()


def test_four_bits_on_a_million_weights() -> None:
    weights = matrix((1000, 1024), seed=3)
    for name in ("nf4", "fp4"):
        packed, state = bnb.quantize_4bit(weights, quant_type=name)
        grid = bnb_grid(name, 1024)
        blocks = grid.quantize(weights)
        assert torch.equal(grid.field(blocks, "qs").reshape(-1), packed.view(-1))
        assert torch.equal(grid.scales(blocks), state.absmax)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000, 300_000])
@pytest.mark.parametrize("what", ["usual", "equal", "wide"])
def test_double_quantization(n: int, what: str) -> None:
    scales = torch.rand(n, generator=torch.Generator().manual_seed(n)) * 0.1
    if what == "equal":
        scales.fill_(0.25)
    elif what == "wide":
        scales = scales**6
    made = compress_scales(scales)
    offset = scales.mean()
    codes, state = bnb.quantize_blockwise(scales - offset, blocksize=256)
    assert made.offset == float(offset)
    assert torch.equal(made.codes, codes)
    assert torch.equal(made.largest, state.absmax)
    assert torch.equal(made.expand(), bnb.dequantize_blockwise(codes, state) + offset)


@pytest.mark.parametrize("name", BNB_KINDS)
def test_pack_undoes_unpack_for_any_bytes(name: str) -> None:
    grid = bnb_grid(name, 192)
    blocks = torch.randint(0, 256, (50, grid.type_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    before = blocks.clone()
    parts = grid.unpack(blocks)
    assert torch.equal(grid.pack(blocks, parts.codes), blocks)
    assert torch.equal(blocks, before)
    mask = grid.code_mask
    assert not mask[:4].any()
    assert bool((mask[4:] == 255).all())


@pytest.mark.parametrize("name", BNB_KINDS)
def test_flips_bracket_the_weight(name: str) -> None:
    """Every flip goes to the level on the other side of the weight; errors add up to the distance of the two levels."""
    weights = matrix((40, 192), seed=5)
    grid = bnb_grid(name, 192)
    blocks = grid.quantize(weights)
    flips = grid.flips(blocks, grid.as_rows(weights))
    assert isinstance(flips, ScalarFlips)
    has_flip = flips.ratio > 1e-3
    assert float(has_flip.float().mean()) > 0.9
    changed, outcome = grid.apply(blocks, flips, has_flip.float())
    old, new = grid.dequantize(blocks).view(weights.shape), grid.dequantize(changed).view(weights.shape)
    moved = (old - weights) * (new - weights)
    assert bool((moved[has_flip] <= 0).all())
    assert torch.equal(old[~has_flip], new[~has_flip])
    assert torch.equal(grid.scales(changed), grid.scales(blocks))
    before, after = (old - weights).double(), (new - weights).double()
    assert outcome.n_changed == int(has_flip.sum())
    assert outcome.projection == pytest.approx(float((before * after).sum()), rel=1e-3)
    assert outcome.new_energy == pytest.approx(float((after * after).sum()), rel=1e-3)


@pytest.mark.parametrize("name", BNB_KINDS)
def test_cells_are_where_the_quantizer_says(name: str) -> None:
    """A point just inside a cell rounds to its code, one just outside does not; the weights that set scales are left alone."""
    weights = matrix((40, 192), seed=6)
    grid = bnb_grid(name, 192)
    blocks = grid.quantize(weights)
    codes = grid.unpack(blocks).codes
    low, high = grid.cells(blocks, codes)
    free = ~grid.sets_scale(weights).view(low.shape)
    # fp16, which INT8 casts to, moves a number by up to 2^-11 of itself: stay that far from the edge.
    margin = 0.07 * (high - low)
    for inside, outside in ((low + margin, low - margin), (high - margin, high + margin)):
        moved = torch.where(free, inside, weights.view(low.shape)).view(weights.shape)
        assert torch.equal(grid.unpack(grid.quantize(moved)).codes, codes)
        past = torch.where(free, outside, weights.view(low.shape))
        within = past.abs() < 0.98 * grid.scales(blocks).view(-1, 1)  # else it would set the scale
        past = torch.where(within, past, weights.view(low.shape)).view(weights.shape)
        differs = grid.unpack(grid.quantize(past)).codes != codes
        assert torch.equal(differs, (free & within))


def test_fp4_zero_patterns() -> None:
    weights = torch.zeros(1, BLOCK)
    weights[0, :4] = torch.tensor([1.0, 1e-4, -1e-4, 0.0])
    grid = bnb_grid("fp4", BLOCK)
    blocks = grid.quantize(weights)
    assert grid.field(blocks, "qs")[0, :2].tolist() == [0x38, 0x00]
    codes = grid.unpack(blocks).codes.clone()
    assert torch.equal(grid.pack(blocks, codes), blocks)
    codes[0, 0] = 7
    assert grid.field(grid.pack(blocks, codes), "qs")[0, 0] == 0x08


def test_int8_refuses_what_fp16_cannot_hold() -> None:
    weights = matrix((2, 64))
    weights[1, 3] = 7e4
    with pytest.raises(FormatError, match="beyond its 65504"):
        bnb_grid("int8", 64).quantize(weights)


def test_unknown_format() -> None:
    with pytest.raises(UnsupportedError, match="choose one of nf4, fp4, int8"):
        bnb_grid("int3", 64)


def test_names() -> None:
    assert [bnb_grid(name, 64).name for name in BNB_KINDS] == ["NF4", "FP4", "INT8"]
    assert isinstance(bnb_grid("nf4", 64), NF4)
    assert isinstance(bnb_grid("fp4", 64), FP4)
    assert isinstance(bnb_grid("int8", 64), Int8Grid)
