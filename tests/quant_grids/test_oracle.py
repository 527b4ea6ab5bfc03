"""Every grid against libggml and gguf: layouts, dequantized values bit for bit, and bytes that survive a round trip."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_grids import GRIDS, Grid, ScalarGrid
from quant_grids.errors import FormatError
from tests.helpers import ggml_oracle
from tests.helpers.ggml_oracle import Bytes
from tests.helpers.grid_data import ALL, LATTICE, by_name, hostile_blocks, importance, lattice, quantized, random_blocks

NUMBER_OF_TYPES = 43  # GGML_TYPE_COUNT; the library cannot be asked for it
NOT_WRITTEN = {"q8_1", "q8_K", "DEPRECATED"}  # the first two are for activations only; no file has them
BOOK_SIZES = {"IQ2_XXS": 256, "IQ2_XS": 512, "IQ2_S": 1024, "IQ3_XXS": 256, "IQ3_S": 512, "IQ1_S": 2048, "IQ1_M": 2048}


def repacked(grid: Grid, blocks: torch.Tensor) -> torch.Tensor:
    if isinstance(grid, ScalarGrid):
        return grid.pack(blocks, grid.unpack(blocks).codes)
    codes = lattice(grid.name).unpack(blocks)
    return lattice(grid.name).pack(blocks, codes.index, codes.mark)


def check_bits(grid: Grid, blocks: Bytes) -> None:
    """Dequantized values are libggml's bit for bit (a NaN equals any NaN), and packing what was unpacked changes nothing."""
    before = blocks.copy()
    ours = grid.dequantize(torch.from_numpy(blocks)).numpy()
    theirs = ggml_oracle.dequantize(int(grid.ggml_type), blocks)
    assert ours.shape == theirs.shape
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    worst = np.argwhere(~same)[:1].tolist()
    assert same.all(), f"{(~same).sum()} of {same.size} values differ, first at [block, weight] {worst}"
    np.testing.assert_array_equal(repacked(grid, torch.from_numpy(blocks)).numpy(), blocks)
    np.testing.assert_array_equal(blocks, before)


def test_every_type_that_libggml_quantizes_has_a_grid() -> None:
    missing = []
    for number in range(NUMBER_OF_TYPES):
        traits = ggml_oracle.type_traits(number)
        if traits.is_quantized and traits.type_size and traits.name not in NOT_WRITTEN and number not in GRIDS:
            missing.append(traits.name)
    assert not missing
    assert len(GRIDS) == 25


@pytest.mark.parametrize("name", ALL)
def test_layout(name: str) -> None:
    grid = by_name(name)
    traits = ggml_oracle.type_traits(int(grid.ggml_type))
    assert traits.name.lower() == name.lower()
    assert (traits.block_size, traits.type_size) == (grid.block_size, grid.type_size)
    assert sum(grid.fields.values()) == grid.type_size
    listed = {int(number): sizes for number, sizes in GGML_QUANT_SIZES.items()}
    if int(grid.ggml_type) in listed:
        assert listed[int(grid.ggml_type)] == (grid.block_size, grid.type_size)


@pytest.mark.parametrize("name", ALL)
def test_random_bytes(name: str) -> None:
    grid = by_name(name)
    check_bits(grid, random_blocks(grid, max(4096, (1 << 19) // grid.block_size) // 4))


@pytest.mark.parametrize("name", ALL)
def test_hostile_scales(name: str) -> None:
    check_bits(by_name(name), hostile_blocks(by_name(name)))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["trained", "odd"])
def test_real_blocks(name: str, kind: str) -> None:
    grid = by_name(name)
    for weighted in (False, True):
        check_bits(grid, quantized(grid, kind, weighted)[0].numpy())


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_shape_and_any_values(name: str, data: st.DataObject) -> None:
    grid = by_name(name)
    n_rows, n_blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    columns = n_blocks * grid.block_size
    finite = st.floats(-65504.0, 65504.0, width=32)
    pool = data.draw(st.lists(finite, min_size=1, max_size=40))
    seed = data.draw(st.integers(0, 2**32 - 1))
    rows = np.random.default_rng(seed).choice(np.array(pool, np.float32), (n_rows, columns))
    blocks = ggml_oracle.quantize(int(grid.ggml_type), rows, importance(columns))
    check_bits(grid, blocks)
    flips = grid.flips(torch.from_numpy(blocks), torch.from_numpy(rows))
    assert flips.ratio.shape == flips.gain.shape
    assert flips.ratio.shape[0] == flips.energy.shape[0] == n_rows


@pytest.mark.parametrize("name", ALL)
def test_blocks_in_odd_storage(name: str) -> None:
    """Blocks that are strided and unaligned in memory."""
    grid = by_name(name)
    blocks = torch.from_numpy(random_blocks(grid, 6))
    plain = grid.dequantize(blocks).nan_to_num(nan=7.0)
    wide = torch.zeros(6, grid.type_size + 3, dtype=torch.uint8)
    wide[:, 1:-2] = blocks
    torch.testing.assert_close(grid.dequantize(wide[:, 1:-2]).nan_to_num(nan=7.0), plain, rtol=0, atol=0)
    torch.testing.assert_close(repacked(grid, wide[:, 1:-2]), blocks)


@pytest.mark.parametrize("name", ALL)
def test_wrong_blocks_are_refused(name: str) -> None:
    grid = by_name(name)
    for blocks in (
        torch.zeros(2, grid.type_size + 1, dtype=torch.uint8),
        torch.zeros(2, grid.type_size),
        torch.zeros(grid.type_size, dtype=torch.uint8),
    ):
        with pytest.raises(FormatError, match=rf"{name} needs blocks of uint8 \[n, {grid.type_size}\]"):
            grid.dequantize(blocks)


@pytest.mark.parametrize("name", ALL)
def test_code_mask_is_exact(name: str) -> None:
    """Changing a bit inside the mask changes codes only; a bit outside it changes none."""
    grid = by_name(name)
    block = torch.from_numpy(random_blocks(grid, 1, seed=6))
    mask = np.unpackbits(grid.code_mask.numpy(), bitorder="little").astype(bool)
    bits = np.unpackbits(block.numpy()[0], bitorder="little")
    variants = np.tile(bits, (len(bits), 1)) ^ np.eye(len(bits), dtype=np.uint8)
    changed = torch.from_numpy(np.packbits(variants, axis=1, bitorder="little"))
    moved = np.array([grid.changed_codes(block, changed[i : i + 1])[0] > 0 for i in range(len(bits))])
    assert not moved[~mask].any()
    if name in ("TQ1_0", "MXFP4", "NVFP4"):
        # 13 of TQ1_0's 256 bytes are second spellings; the sign of a floating-point zero is a code bit that changes no code.
        assert moved[mask].mean() > 0.9
    else:
        assert moved[mask].all()


def test_lattice_code_books_are_libggml_s() -> None:
    """A block with every index in turn: the book read from gguf is the one in libggml."""
    for name in LATTICE:
        grid = lattice(name)
        codes = grid.unpack(torch.zeros(1, grid.type_size, dtype=torch.uint8))
        size = BOOK_SIZES[name]
        per_block = codes.index.numel()
        index = torch.arange(size, dtype=torch.int32).view(-1, codes.index.shape[1])
        blocks = torch.from_numpy(random_blocks(grid, size // per_block, seed=7))
        blocks = grid.pack(blocks, index, torch.zeros(len(index), dtype=torch.uint8))
        check_bits(grid, blocks.numpy())
        assert torch.equal(grid.unpack(blocks).index, index)
