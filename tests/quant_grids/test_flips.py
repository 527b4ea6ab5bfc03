"""Flips held against brute force: what they claim is recomputed from the bytes in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from quant_grids import Flips
from tests.helpers.grid_data import (
    ALL,
    FINE,
    SCALAR,
    by_name,
    errors,
    greedy,
    hostile_blocks,
    importance,
    numbers,
    quantized,
    recomputed,
    scalar,
    uniform,
)


def random_choice(flips: Flips, share: float, seed: int = 0) -> Tensor:
    return (torch.rand(flips.ratio.shape, generator=torch.Generator().manual_seed(seed)) < share).float()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["trained", "odd"])
def test_only_code_bits_change(name: str, kind: str) -> None:
    grid = by_name(name)
    blocks, weights = quantized(grid, kind)
    before = blocks.clone()
    flips = grid.flips(blocks, weights)
    for share in (0.3, 1.0):
        after, outcome = grid.apply(blocks, flips, random_choice(flips, share))
        assert torch.equal(blocks, before)
        assert not ((after ^ blocks) & ~grid.code_mask).any()
        assert not torch.equal(after, blocks)
        count, steps = grid.changed_codes(blocks, after)
        assert (count, steps) == (outcome.n_changed, 1)


@pytest.mark.parametrize("name", ALL)
def test_no_flip_chosen_changes_nothing(name: str) -> None:
    grid = by_name(name)
    for kind in ("trained", "odd"):
        blocks, weights = quantized(grid, kind)
        flips = grid.flips(blocks, weights)
        after, outcome = grid.apply(blocks, flips, torch.zeros_like(flips.ratio))
        assert torch.equal(after, blocks)
        assert outcome.n_changed == 0
        assert (outcome.alignment, outcome.added_error) == (1.0, 0.0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("weighted", [False, True])
def test_outcome_is_what_the_bytes_say(name: str, weighted: bool) -> None:
    grid = by_name(name)
    blocks, weights = quantized(grid, weighted=weighted)
    flips = grid.flips(blocks, weights, torch.from_numpy(importance(1024)) if weighted else None)
    for share in (0.1, 0.5, 1.0):
        after, outcome = grid.apply(blocks, flips, random_choice(flips, share))
        np.testing.assert_allclose(numbers(outcome), recomputed(grid, blocks, after, weights), rtol=2e-5)
    assert float(flips.energy.sum()) == pytest.approx(recomputed(grid, blocks, blocks, weights)[0], rel=1e-5)


@pytest.mark.parametrize("name", SCALAR)
@pytest.mark.parametrize("weighted", [False, True])
def test_scalar_gain_and_ratio_by_brute_force(name: str, weighted: bool) -> None:
    """Each weight's flip is its own: take all of them and look at every weight."""
    grid = scalar(name)
    blocks, weights = quantized(grid, weighted=weighted)
    h = importance(1024) if weighted else np.ones(1024, np.float32)
    flips = grid.flips(blocks, weights, torch.from_numpy(h) if weighted else None)
    after, _ = grid.apply(blocks, flips, torch.ones_like(flips.ratio))
    old, new = errors(grid, blocks, weights).numpy(), errors(grid, after, weights).numpy()
    distance = np.abs(new - old)
    offered = flips.step.numpy() != 0
    np.testing.assert_array_equal(offered, distance > 0)
    gain, cost = old * old - old * new, new * new - old * old
    np.testing.assert_allclose(flips.gain.numpy(), gain, atol=1e-4 * float((distance**2).max()))
    ratio = np.divide(gain, h * cost + 2 * gain, out=np.zeros_like(gain), where=offered)
    ratio[offered & (h * cost + 2 * gain <= 0)] = 1.0
    np.testing.assert_allclose(flips.ratio.numpy(), ratio.clip(0, 1), atol=1e-3)
    assert (gain[offered] > 0).all()


@pytest.mark.parametrize("name", SCALAR)
def test_scalar_flip_goes_to_the_other_side(name: str) -> None:
    """To the neighbouring level, towards and past the weight (unless the plain code was not the nearest level)."""
    grid = scalar(name)
    blocks, weights = quantized(grid)
    flips = grid.flips(blocks, weights)
    after, _ = grid.apply(blocks, flips, torch.ones_like(flips.ratio))
    old, new = errors(grid, blocks, weights), errors(grid, after, weights)
    moved = flips.step != 0
    assert bool((new - old)[moved].sign().eq(-old[moved].sign()).all())
    nearest = flips.ratio <= 0.5
    assert bool((new * old)[moved & nearest].le(0).all())
    before_codes, after_codes = grid.unpack(blocks).codes.int(), grid.unpack(after).codes.int()
    assert int((after_codes - before_codes).abs().max()) == 1
    assert int(after_codes.max()) < len(grid.levels)
    inside = (grid.unpack(blocks).codes > 0) & (grid.unpack(blocks).codes < len(grid.levels) - 1)
    if name not in ("Q8_0", "TQ2_0"):  # these have codes that no flip may reach, see below
        free = inside.view(weights.shape) & (flips.gain != 0)
        assert bool(moved[free].all())


@pytest.mark.parametrize(("name", "forbidden", "reached"), [("Q8_0", 0, 1), ("TQ2_0", 3, 2)])
def test_forbidden_codes_are_not_reached(name: str, forbidden: int, reached: int) -> None:
    """-128 in Q8_0, 2 in TQ2_0: no flip goes there, and what stands there already only comes inward, towards its weight."""
    grid = uniform(name)
    block = torch.zeros(1, grid.type_size, dtype=torch.uint8)
    grid.field(block, "d")[:] = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8)
    codes = torch.full((1, grid.block_size), reached, dtype=torch.uint8)
    codes[:, ::2] = forbidden
    block = grid.pack(block, codes)
    level = grid.levels[forbidden]
    inward = 1.0 if forbidden == 0 else -1.0
    for away, offered in ((0.3 * inward, True), (-0.3 * inward, False)):
        weights = torch.full((1, grid.block_size), level + away)
        weights[:, 1::2] = grid.levels[reached] - 0.3 * inward
        flips = grid.flips(block, weights)
        assert bool((flips.step[:, 1::2] == 0).all())
        assert bool((flips.step[:, ::2] == (inward if offered else 0.0)).all())
        assert bool((flips.gain >= 0).all())
        assert bool((flips.ratio >= 0).all())
        after, _ = grid.apply(block, flips, torch.ones_like(flips.ratio))
        assert int((grid.unpack(after).codes == forbidden).sum()) == (0 if offered else grid.block_size // 2)


@pytest.mark.parametrize("name", ALL)
def test_odd_scales_and_weights_offer_no_flips(name: str) -> None:
    """NaN, infinite and zero scales, NaN and infinite weights: nothing to choose there, and everything stays a number."""
    grid = by_name(name)
    blocks = torch.from_numpy(hostile_blocks(grid))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(blocks), grid.block_size, generator=generator) * 0.02
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-45])
    where = torch.randint(0, weights.numel(), (len(blocks),), generator=generator)
    weights.view(-1)[where] = odd[torch.arange(len(where)) % len(odd)]
    for h in (None, torch.from_numpy(importance(grid.block_size))):
        flips = grid.flips(blocks, weights, h)
        for numbers_ in (flips.ratio, flips.gain, flips.energy):
            assert bool(torch.isfinite(numbers_).all())
        assert bool((flips.ratio >= 0).all())
        assert bool((flips.ratio <= 1).all())
        assert bool((flips.gain >= 0).all())
        after, outcome = grid.apply(blocks, flips, torch.ones_like(flips.ratio))
        assert np.isfinite(numbers(outcome)).all()
        assert not ((after ^ blocks) & ~grid.code_mask).any()
        values = grid.dequantize(blocks)
        broken = ~torch.isfinite(values) | ~torch.isfinite(weights)
        moved = grid.dequantize(after).nan_to_num(nan=9.0) != values.nan_to_num(nan=9.0)
        assert not bool((moved & broken).any())
        zero = (values == 0).all(1)
        assert torch.equal(after[zero], blocks[zero])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("target", [0.5, 0.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_greedy_reaches_the_target(name: str, target: float, weighted: bool) -> None:
    if name == "Q1_0":  # weights beyond the two levels have no flip, and they hold much of the error
        target = max(target, 0.2)
    grid = by_name(name)
    blocks, weights = quantized(grid, weighted=weighted)
    flips = grid.flips(blocks, weights, torch.from_numpy(importance(1024)) if weighted else None)
    after, outcome = grid.apply(blocks, flips, greedy(flips, target))
    energy, projection, _ = recomputed(grid, blocks, after, weights)
    assert projection / energy == pytest.approx(target, abs=0.01 if grid.kind == "scalar" else 0.05)
    assert outcome.alignment == pytest.approx(projection / energy, abs=1e-3)


@pytest.mark.parametrize("name", FINE)
def test_added_error_is_the_closed_form(name: str) -> None:
    """Weights spread evenly between the levels of a fine grid: c = 0 flips 18.4% and adds 20.3% squared error."""
    grid = uniform(name)
    blocks, _ = quantized(grid)
    codes = grid.unpack(blocks).codes
    parts = grid.unpack(grid.pack(blocks, codes.clamp(2, len(grid.levels) - 3)))
    spread = torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    units = (grid.levels_of(parts.codes) + spread).view(len(blocks), -1, grid.sub_size)
    weights = units * parts.scale.unsqueeze(-1)
    if parts.offset is not None:
        weights += parts.offset.unsqueeze(-1)
    rows = weights.view(-1, 1024)
    inner = grid.pack(blocks, parts.codes)
    flips = grid.flips(inner, rows)
    after, outcome = grid.apply(inner, flips, greedy(flips, 0.0))
    energy, projection, new_energy = recomputed(grid, inner, after, rows)
    threshold = np.sqrt(1 / 4 - 1 / 12)
    added = 12 * (2 * (0.5 - threshold) - 2 * (0.25 - threshold**2))
    assert projection / energy == pytest.approx(0.0, abs=0.01)
    assert new_energy / energy - 1.0 == pytest.approx(added, abs=0.01)
    assert outcome.n_changed / rows.numel() == pytest.approx(1 - 2 * threshold, abs=0.02)


@pytest.mark.parametrize("name", FINE)
def test_added_error_on_real_blocks(name: str) -> None:
    """libggml's own rounding: its scale search makes small errors commoner than large ones, so flips cost more."""
    grid = uniform(name)
    blocks, weights = quantized(grid)
    flips = grid.flips(blocks, weights)
    _, outcome = grid.apply(blocks, flips, greedy(flips, 0.0))
    assert 0.15 < outcome.added_error < 0.35


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_minus_zero_keeps_its_sign(name: str) -> None:
    """Nibble 8 is minus zero: it stays where the weight stays zero; a weight that becomes zero is written as plus zero."""
    grid = scalar(name)
    block = torch.zeros(1, grid.type_size, dtype=torch.uint8)
    grid.field(block, "qs")[:] = 0x81  # code of the low nibble: +1 in table units, of the high one: minus zero
    codes = grid.unpack(block).codes
    assert sorted(codes.unique().tolist()) == [7, 8]
    assert torch.equal(grid.pack(block, codes), block)
    zeros = grid.pack(block, torch.full_like(codes, 7))
    assert bool((grid.field(zeros, "qs") == 0x80).all())


def test_unchanged_ternary_bytes_keep_their_spelling() -> None:
    """TQ1_0: every byte value survives beside a byte that changes, also the 13 that the quantizer never writes."""
    grid = scalar("TQ1_0")
    block = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(54)[: 256 * 54].view(256, 54)
    codes = grid.unpack(block).codes
    # Each row holds one byte value per position; change the first digit of the first byte only.
    changed = codes.clone()
    changed[:, 0] = (codes[:, 0] + 1) % 3
    packed = grid.pack(block, changed)
    assert torch.equal(grid.unpack(packed).codes, changed)
    assert torch.equal(packed[:, 1:], block[:, 1:])
    assert bool((packed[:, 0] != block[:, 0]).all())
