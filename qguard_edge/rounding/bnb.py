"""Choose the rounding of one matrix in a format of bitsandbytes: the planner of checkpoints with chosen codes.

The same walk as for a GGUF's tensors (`qguard_edge.rounding.gguf`), with the plain rounding made here: bitsandbytes' own,
scales included. A defense then flips codes, or moves the weights and has them rounded again.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convert.tensor_io import SLICE_WEIGHTS, RowSlice
from qguard_edge.defenses.base import Defense, Inputs, SliceKey
from qguard_edge.rounding.by_inputs import MatrixWork, round_matrices
from qguard_edge.rounding.choose import choose_rounding, measured_outcome
from quant_grids import Flips, Outcome
from quant_grids.bnb import BnbGrid, bnb_grid
from quant_grids.bnb_scales import NestedScales, compress_scales


@dataclass(frozen=True)
class HardenedMatrix:
    """A matrix with chosen codes.

    Attributes:
        grid: its format.
        blocks: uint8 `[n_blocks, type_size]`, scales as a loaded model computes with them.
        nested: the compressed scales, with double quantization.
        outcome: what the change did.
        bits: entropy of the random choices, where the rule measures it.
    """

    grid: BnbGrid
    blocks: Tensor
    nested: NestedScales | None
    outcome: Outcome
    bits: float = 0.0


def slices_of_rows(rows: Tensor) -> list[RowSlice]:
    """Cut a matrix `[rows, columns]` into slices that stay in a core's cache."""
    step = max(1, SLICE_WEIGHTS // rows.shape[1])
    return [RowSlice(i, start, min(start + step, len(rows))) for i, start in enumerate(range(0, len(rows), step))]


def harden_matrix(
    weights: Tensor,
    kind: str,
    defense: Defense[Any],
    *,
    key: Callable[[int], SliceKey],
    pool: ThreadPoolExecutor,
    double_quant: bool = False,
    inputs: Inputs | None = None,
) -> HardenedMatrix:
    """Quantize one matrix as bitsandbytes does and let a defense choose the codes.

    Args:
        weights: `[rows, columns]` of f32, f16 or bf16; not modified.
        kind: nf4, fp4 or int8.
        defense: the rule.
        key: random numbers of a slice, from its number.
        pool: threads.
        double_quant: compress the scales first, so that the codes are chosen against the scales that will be used.
        inputs: Gram matrices of the matrices' inputs, for a rule that wants them.
    """
    grid = bnb_grid(kind, weights.shape[1])
    rows = grid.as_rows(weights)
    with torch.inference_mode():
        plain, nested = quantized(grid, weights, double_quant)
    if defense.requantizes:
        with torch.inference_mode():
            moved = _moved(grid, plain, rows, defense, key, pool).reshape(-1)[: weights.numel()].view(weights.shape)
            blocks, nested = quantized(grid, moved, double_quant)
            outcome = measured_outcome(grid, plain, blocks, rows)
        return HardenedMatrix(grid, blocks, nested, outcome)
    blocks, per_row = torch.empty_like(plain), rows.shape[1] // grid.block_size

    def flips_of(part: RowSlice) -> tuple[Tensor, Flips]:
        mine = plain[part.start * per_row : part.stop * per_row]
        return mine, grid.flips(mine, rows[part.start : part.stop])

    def sink(part: RowSlice, changed: Tensor) -> None:
        blocks[part.start * per_row : part.stop * per_row] = changed

    if defense.wants_inputs:
        matrix = MatrixWork(
            name=key(0).tensor,
            expert=0,
            grid=grid,
            columns=rows.shape[1],
            first=0,
            rows=len(rows),
            read=lambda part: (plain[part.start * per_row : part.stop * per_row], rows[part.start : part.stop]),
            key=lambda part: replace(key(part.index), row=part.start),
            sink=sink,
        )
        # Rows that are no multiple of the block are cut anew: their columns are not those of the inputs.
        known = inputs if rows.shape == weights.shape else None
        (found,) = round_matrices([matrix], defense, known, pool, weights.device)
        return HardenedMatrix(grid, blocks, nested, found.outcome, found.bits)
    outcome = choose_rounding(
        grid,
        defense,
        slices_of_rows(rows),
        flips_of=flips_of,
        key_of=lambda part: replace(key(part.index), row=part.start),
        sink=sink,
        pool=pool,
    )
    return HardenedMatrix(grid, blocks, nested, outcome)


def quantized(grid: BnbGrid, weights: Tensor, double_quant: bool) -> tuple[Tensor, NestedScales | None]:
    """A matrix as bitsandbytes rounds it, with the scales that a loaded model computes with, and their compressed form."""
    blocks = grid.quantize(weights)
    if not double_quant:
        return blocks, None
    nested = compress_scales(grid.scales(blocks))
    return grid.with_scales(blocks, nested.expand()), nested


def _moved(
    grid: BnbGrid,
    plain: Tensor,
    rows: Tensor,
    defense: Defense[Any],
    key: Callable[[int], SliceKey],
    pool: ThreadPoolExecutor,
) -> Tensor:
    """The moved weights, which are then rounded: f32 of the shape of `rows`."""
    half_width = float(grid.steps(plain).median()) / 2.0
    values = grid.dequantize(plain).view(rows.shape)

    def move(part: RowSlice) -> Tensor:
        with torch.inference_mode():
            here = slice(part.start, part.stop)
            return defense.move(rows[here], values[here], half_width, key(part.index))

    return torch.cat(list(pool.map(move, slices_of_rows(rows))))
