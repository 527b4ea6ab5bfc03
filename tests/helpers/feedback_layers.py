"""Layers that the tests of feedback share: plain blocks, weights, and the Gram matrix of correlated inputs."""

import math
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from qguard_edge.defenses.base import SliceKey
from quant_grids import GRIDS
from quant_grids.base import ScalarGrid
from quant_grids.lattice_base import LatticeGrid
from tests.helpers import ggml_oracle

KEY = SliceKey(seed=1, tensor="blk.0.ffn_up.weight", index=0)
CPU = torch.device("cpu")


def grid_of(name: str) -> ScalarGrid:
    grid = next(grid for grid in GRIDS.values() if grid.name == name)
    assert isinstance(grid, ScalarGrid)
    return grid


def layer(name: str, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Plain blocks, weights and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, columns, generator=generator) * 0.02
    inputs = torch.randn(300, 40, generator=generator) @ torch.randn(40, columns, generator=generator)
    inputs += 2.0 * torch.randn(300, columns, generator=generator)
    blocks = torch.from_numpy(ggml_oracle.quantize(int(grid_of(name).ggml_type), weights.numpy()))
    return blocks, weights, inputs.T @ inputs / 300


def output_error(error: Tensor, gram: Tensor) -> float:
    return float(((error @ gram) * error).sum())


def lattice_of(name: str) -> LatticeGrid:
    grid = next(grid for grid in GRIDS.values() if grid.name == name)
    assert isinstance(grid, LatticeGrid)
    return grid


def lattice_layer(name: str, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    _, weights, gram = layer("Q8_0", rows, columns)
    importance = gram.diagonal().numpy()
    return (
        torch.from_numpy(ggml_oracle.quantize(int(lattice_of(name).ggml_type), weights.numpy(), importance)),
        weights,
        gram,
    )


def entropy_of(blocks: Tensor) -> float:
    """Bits per block of many draws of the same block: what was counted, and Miller's correction for what was not."""
    counts = np.array(list(Counter(bytes(block) for block in blocks.numpy()).values()), float)
    chance = counts / len(blocks)
    return float(-(chance * np.log2(chance)).sum()) + (len(counts) - 1) / (2 * len(blocks) * math.log(2))
