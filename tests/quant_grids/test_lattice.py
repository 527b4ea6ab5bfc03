"""Lattice moves: each stage by brute force, and the whole against the best choice out of all points of the lattice."""

import numpy as np
import pytest
import torch
from torch import Tensor

from quant_grids.lattice_base import LatticeGrid, SignedGrid, code_book
from tests.helpers.grid_data import LATTICE, errors, greedy, importance, lattice, quantized

CPU = torch.device("cpu")


def every_point(grid: LatticeGrid, target: Tensor) -> Tensor:
    """The lattice vector nearest to each target, f32 `[n, 8]`: all points of the book, all signs that are allowed."""
    points = code_book(grid.book, CPU).points
    if not isinstance(grid, SignedGrid):
        books = [points] if grid.name == "IQ1_S" else [points + 0.125, points - 0.125]
        points = torch.cat(books)
        return points[nearest_of(points, target)]
    dims = points.shape[1]
    signs = torch.where(target < 0, -1.0, 1.0)
    magnitude = target.abs()
    free = points[nearest_of(points, magnitude.view(-1, dims))].view(-1, 8) * signs
    if not grid.even:
        return free
    # With an odd number of minus signs one of them is wrong: try all eight.
    odd = (target < 0).sum(1) % 2 == 1
    best, distance = free, torch.where(odd, torch.inf, 0.0)
    for j in range(8):
        turned_signs, turned = signs.clone(), magnitude.clone()
        turned_signs[:, j] *= -1
        turned[:, j] *= -1
        candidate = points[nearest_of(points, turned.view(-1, dims))].view(-1, 8) * turned_signs
        further = (candidate - target).square().sum(1)
        best = torch.where((further < distance).unsqueeze(1), candidate, best)
        distance = torch.minimum(distance, further)
    return best


def nearest_of(points: Tensor, target: Tensor) -> Tensor:
    return (target @ points.T - 0.5 * points.square().sum(1)).argmax(1)


def cheapest(grid: LatticeGrid, blocks: Tensor, weights: Tensor) -> float:
    """Least added squared error, relative, of any choice of lattice points with the projection at 0 (a Lagrange search)."""
    codes = grid.unpack(blocks)
    vector = grid.vectors(codes.index, codes.mark)
    position = weights.view(-1, 8) / codes.scale - (0.0 if codes.shift is None else codes.shift)
    error, square = vector - position, codes.scale.square().view(-1)
    energy = float((error.square().sum(1) * square).sum())
    low, high = 0.0, 2.0
    for _ in range(12):
        strength = (low + high) / 2
        move = every_point(grid, position - strength * error) - vector
        gain = float((-(move * error).sum(1) * square).sum())
        low, high = (strength, high) if gain < energy else (low, strength)
    added = float(((move.square().sum(1) + 2.0 * (move * error).sum(1)) * square).sum())
    return added / energy


@pytest.mark.parametrize("name", LATTICE)
def test_added_error_is_near_the_best_of_all_choices(name: str) -> None:
    """It can be negative: libggml weighs errors by the size of the weights, so its points are not the nearest ones."""
    grid = lattice(name)
    blocks, weights = (part[: len(part) // 4] for part in quantized(grid))
    flips = grid.flips(blocks, weights)
    _, outcome = grid.apply(blocks, flips, greedy(flips, 0.0))
    assert outcome.alignment == pytest.approx(0.0, abs=0.01)
    best = cheapest(grid, blocks, weights)
    assert best - 0.01 < outcome.added_error < best + 0.02


@pytest.mark.parametrize("name", LATTICE)
@pytest.mark.parametrize("weighted", [False, True])
def test_stages_by_brute_force(name: str, weighted: bool) -> None:
    """Take the first k stages of every group: gains, costs and ratios are what the bytes say, group by group."""
    grid = lattice(name)
    blocks, weights = quantized(grid, weighted=weighted)
    h = importance(weights.shape[1]) if weighted else np.ones(weights.shape[1], np.float32)
    flips = grid.flips(blocks, weights, torch.from_numpy(h) if weighted else None)
    stages = len(grid.strengths)
    ratio = flips.ratio.view(-1, stages).numpy()
    gain = flips.gain.view(-1, stages).numpy()
    weight = np.tile(h, len(weights)).reshape(-1, 8).astype(np.float64)
    old = errors(grid, blocks, weights).view(-1, 8).numpy()
    energy = (old * old).sum(1)
    last_gain, last_cost = np.zeros(len(old)), np.zeros(len(old))
    for stage in range(1, stages + 1):
        chosen = torch.zeros(len(old), stages)
        chosen[:, :stage] = 1.0
        after, _ = grid.apply(blocks, flips, chosen.view(flips.ratio.shape))
        new = errors(grid, after, weights).view(-1, 8).numpy()
        total_gain, total_cost = ((old - new) * old).sum(1), (weight * (new * new - old * old)).sum(1)
        offered = ratio[:, stage - 1] > 0
        np.testing.assert_allclose(gain[:, stage - 1], total_gain - last_gain, atol=2e-5 * float(energy.max()))
        assert ((total_gain == last_gain) | offered).all()
        more_gain, more_cost = (total_gain - last_gain)[offered], (total_cost - last_cost)[offered]
        assert (more_gain > 0).all()
        bottom = more_cost + 2.0 * more_gain
        expected = np.where(bottom > 0, more_gain / np.where(bottom > 0, bottom, 1.0), 1.0)
        before = ratio[offered, : stage - 1]
        if stage > 1:  # a later stage is never listed above an earlier one, so that they are taken in order
            ceiling = np.where(before > 0, before, np.inf).min(1)
            expected = np.minimum(expected, ceiling)
        np.testing.assert_allclose(ratio[offered, stage - 1], expected.clip(0, 1), atol=2e-3)
        last_gain, last_cost = total_gain, total_cost


@pytest.mark.parametrize("name", LATTICE)
@pytest.mark.parametrize("target", [0.8, 0.5, 0.0, -0.3])
def test_stages_serve_every_target(name: str, target: float) -> None:
    grid = lattice(name)
    blocks, weights = quantized(grid)
    flips = grid.flips(blocks, weights)
    after, outcome = grid.apply(blocks, flips, greedy(flips, target))
    old, new = errors(grid, blocks, weights), errors(grid, after, weights)
    assert float((old * new).sum() / (old * old).sum()) == pytest.approx(target, abs=0.01)
    assert outcome.alignment == pytest.approx(target, abs=0.01)


@pytest.mark.parametrize("name", LATTICE)
@pytest.mark.parametrize("width", [0.1, 0.5])
def test_random_thresholds_keep_the_projection(name: str, width: float) -> None:
    """Stages chosen out of order: the group ends where its gain is nearest to what was chosen, so the sum holds."""
    grid = lattice(name)
    blocks, weights = quantized(grid)
    flips = grid.flips(blocks, weights)
    noise = torch.rand(flips.ratio.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    score = flips.ratio + width * noise * (flips.ratio > 0)
    chosen = greedy(type(flips)(**{**vars(flips), "ratio": score}), 0.0)
    _, outcome = grid.apply(blocks, flips, chosen)
    asked = 1.0 - float((chosen * flips.gain).sum() / flips.energy.sum())
    assert asked == pytest.approx(0.0, abs=0.005)
    assert outcome.alignment == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("name", LATTICE)
def test_importance_moves_the_error_to_unimportant_weights(name: str) -> None:
    """With an importance the weighted squared error grows less, for the same projection."""
    grid = lattice(name)
    blocks, weights = quantized(grid)
    h = torch.from_numpy(importance(weights.shape[1]))
    added = []
    for used in (None, h):
        flips = grid.flips(blocks, weights, used)
        after, outcome = grid.apply(blocks, flips, greedy(flips, 0.0))
        assert outcome.alignment == pytest.approx(0.0, abs=0.01)
        old, new = errors(grid, blocks, weights), errors(grid, after, weights)
        added.append(float((h * (new**2 - old**2)).sum() / (h * old**2).sum()))
    assert added[1] < added[0] - 0.05


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ3_XXS"])
def test_sign_parity_holds(name: str) -> None:
    """Seven sign bits are stored: every pattern that comes out of a search has an even number of minus signs."""
    grid = lattice(name)
    target = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)) * 20
    index, mark = grid.nearest(target, None)
    assert not any(int(byte).bit_count() & 1 for byte in mark.tolist())
    zero = torch.zeros(4096 // 32, grid.type_size, dtype=torch.uint8)
    codes = grid.unpack(grid.pack(zero, index, mark))
    assert torch.equal(codes.mark, mark)
    assert torch.equal(codes.index, index)


@pytest.mark.parametrize("name", LATTICE)
def test_search_finds_the_nearest_point(name: str) -> None:
    """The cell tables seldom miss the nearest point, and what they find instead is hardly further."""
    grid = lattice(name)
    blocks, weights = quantized(grid)
    codes = grid.unpack(blocks)
    target = weights.view(-1, 8) / codes.scale - (0.0 if codes.shift is None else codes.shift)
    found = grid.vectors(*grid.nearest(target, None))
    best = every_point(grid, target)
    ours, least = (found - target).square().sum(1), (best - target).square().sum(1)
    assert bool((ours >= least * (1 - 1e-4) - 1e-3).all())
    assert float((ours > least * 1.001 + 1e-3).float().mean()) < 0.1
    assert float(ours.sum() / least.sum()) < 1.02
