"""Rows and blocks that the grid tests share: trained-like weights, their quantized blocks, and hostile blocks."""

import functools

import numpy as np
import torch
from torch import Tensor

from quant_grids import GRIDS, Flips, Grid, Outcome, ScalarGrid, UniformGrid
from quant_grids.lattice_base import LatticeGrid
from tests.helpers import ggml_oracle
from tests.helpers.ggml_oracle import Bytes, Floats

ALL = [grid.name for grid in GRIDS.values()]
SCALAR = [grid.name for grid in GRIDS.values() if isinstance(grid, ScalarGrid)]
LATTICE = [grid.name for grid in GRIDS.values() if isinstance(grid, LatticeGrid)]
FINE = ["Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"]  # evenly spaced levels, many of them

# +-0, subnormals, +-infinity, NaN, the largest number, one.
ODD_HALVES = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x7BFF, 0x3C00], np.uint16)


def by_name(name: str) -> Grid:
    return next(grid for grid in GRIDS.values() if grid.name == name)


def scalar(name: str) -> ScalarGrid:
    grid = by_name(name)
    assert isinstance(grid, ScalarGrid)
    return grid


def uniform(name: str) -> UniformGrid:
    grid = by_name(name)
    assert isinstance(grid, UniformGrid)
    return grid


def lattice(name: str) -> LatticeGrid:
    grid = by_name(name)
    assert isinstance(grid, LatticeGrid)
    return grid


@functools.cache
def trained_rows(rows: int = 16, columns: int = 1024, seed: int = 0) -> Floats:
    """Rows as training leaves them: heavier tails than a Gaussian, and every row with its own scale."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_t(6, (rows, columns)) * 0.02 * np.exp(0.3 * rng.standard_normal((rows, 1)))
    narrow: Floats = weights.astype(np.float32)
    return narrow


@functools.cache
def odd_rows(columns: int = 512) -> Floats:
    """Zeros, outliers, subnormals, one value throughout, very small and very large rows."""
    rows = trained_rows(8, columns, seed=1).copy()
    rows[0] = 0.0
    rows[1, : columns // 2] = 0.0
    rows[2] *= 1e-38
    rows[3] *= 1e-7
    rows[4, ::97] *= 50.0
    rows[5] = 0.01
    rows[6] *= 1e5
    rows[7, 1:] = 0.0
    return rows


@functools.cache
def importance(columns: int, seed: int = 2) -> Floats:
    """Importance of the columns: spread over two orders of magnitude, mean 1."""
    values = np.exp(np.random.default_rng(seed).standard_normal(columns))
    relative: Floats = (values / values.mean()).astype(np.float32)
    return relative


def rows_of(kind: str) -> Floats:
    rows: Floats = trained_rows() if kind == "trained" else odd_rows()
    return rows


@functools.cache
def _quantized(name: str, kind: str, weighted: bool) -> Bytes:
    grid, rows = by_name(name), rows_of(kind)
    columns = rows.shape[1]
    if weighted:
        return ggml_oracle.quantize(int(grid.ggml_type), rows, importance(columns))
    equal = np.ones(columns, np.float32) if ggml_oracle.requires_importance(int(grid.ggml_type)) else None
    return ggml_oracle.quantize(int(grid.ggml_type), rows, equal)


def quantized(grid: Grid, kind: str = "trained", weighted: bool = False) -> tuple[Tensor, Tensor]:
    """Rows and what libggml makes of them; with equal importance where a type cannot do without.

    Returns:
        blocks, uint8 `[n_blocks, type_size]`, and the rows, f32 `[rows, columns]`; copies.
    """
    return torch.from_numpy(_quantized(grid.name, kind, weighted).copy()), torch.from_numpy(rows_of(kind).copy())


def random_blocks(grid: Grid, count: int, seed: int = 3) -> Bytes:
    blocks: Bytes = np.random.default_rng(seed).integers(0, 256, (count, grid.type_size), dtype=np.uint8)
    return blocks


def hostile_blocks(grid: Grid) -> Bytes:
    """Random codes under every odd scale: zeros, subnormals, infinities, NaN; all byte values where a scale is a byte."""
    blocks = random_blocks(grid, 512, seed=4)
    rng = np.random.default_rng(5)
    for field in {"d", "dmin", "m", "e", "scales"} & set(grid.fields):
        part = grid.field(torch.from_numpy(blocks), field).numpy()
        if grid.fields[field] == 2:
            part[:] = rng.choice(ODD_HALVES, len(blocks)).view(np.uint8).reshape(-1, 2)
        elif field != "scales":
            part[:] = (np.arange(512)[:, None] + np.arange(part.shape[1])).astype(np.uint8)
        elif "d" not in grid.fields:  # IQ1_M keeps a quarter of its fp16 scale in the top bits of each 16-bit word
            halves = rng.choice(ODD_HALVES, len(blocks))
            for i in range(4):
                part[:, 2 * i + 1] = (part[:, 2 * i + 1] & 15) | ((halves >> (4 * i) & 15) << 4).astype(np.uint8)
    return blocks


def greedy(flips: Flips, target: float) -> Tensor:
    """Flips by falling ratio, over the whole slice, until the projection is `target` times the energy."""
    order = flips.ratio.view(-1).argsort(descending=True)
    gain = flips.gain.view(-1)[order].double()
    need = (1.0 - target) * float(flips.energy.double().sum())
    chosen = torch.zeros(flips.ratio.numel())
    chosen[order] = (gain.cumsum(0) - 0.5 * gain <= need).float() * (gain > 0)
    return chosen.view(flips.ratio.shape)


def errors(grid: Grid, blocks: Tensor, weights: Tensor) -> Tensor:
    """`Q(W) - W` in float64, recomputed from the bytes: `[rows, columns]`."""
    return grid.dequantize(blocks).view(weights.shape).double() - weights.double()


def recomputed(grid: Grid, before: Tensor, after: Tensor, weights: Tensor) -> tuple[float, float, float]:
    """Energy, projection and new energy, in float64 from the bytes; to be compared with an `Outcome`."""
    old, new = errors(grid, before, weights), errors(grid, after, weights)
    return float((old * old).sum()), float((old * new).sum()), float((new * new).sum())


def numbers(outcome: Outcome) -> tuple[float, float, float]:
    return outcome.energy, outcome.projection, outcome.new_energy
