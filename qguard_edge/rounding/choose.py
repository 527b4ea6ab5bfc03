"""Let a defense choose the rounding of one tensor, wherever its bytes come from."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from convert.tensor_io import RowSlice
from qguard_edge.defenses.base import Defense, SliceKey
from quant_grids import Flips, Grid, Outcome


def choose_rounding(
    grid: Grid,
    defense: Defense[Any],
    parts: Sequence[RowSlice],
    *,
    flips_of: Callable[[RowSlice], tuple[Tensor, Flips]],
    key_of: Callable[[RowSlice], SliceKey],
    sink: Callable[[RowSlice, Tensor], None],
    pool: ThreadPoolExecutor,
) -> Outcome:
    """Let a defense choose the rounding of one tensor, slice by slice, wherever its bytes come from.

    Args:
        grid: of the tensor's format.
        defense: the rule.
        parts: the tensor's slices.
        flips_of: the plain blocks of a slice and the flips they offer; called once more per slice if the defense surveys.
        key_of: the slice's random numbers.
        sink: receives the new blocks of each slice, uint8 `[n, type_size]`.
        pool: the threads that slices are spread over.
    """
    defense = defense.on(grid)

    def survey(part: RowSlice) -> Any:
        with torch.inference_mode():
            _, flips = flips_of(part)
            return defense.survey(flips, key_of(part))

    def decide(part: RowSlice, share: Any) -> Outcome:
        with torch.inference_mode():
            blocks, flips = flips_of(part)
            chosen = defense.choose(flips, key_of(part), share)
            changed, outcome = grid.apply(blocks, flips, chosen)
            sink(part, changed)
            return outcome

    shares: list[Any] = [None] * len(parts)
    if defense.surveys:
        shares = list(defense.settle(list(pool.map(survey, parts))))
    return Outcome.sum(pool.map(decide, parts, shares))


def measured_outcome(grid: Grid, before: Tensor, after: Tensor, weights: Tensor) -> Outcome:
    """What became of a slice, from the finished blocks: for changes that are not flips of one set of blocks.

    Args:
        grid: of the format.
        before: uint8 `[n_blocks, type_size]`, the plain blocks.
        after: the same, changed.
        weights: f32 of as many elements as the blocks hold, full precision.
    """
    old = (grid.dequantize(before).view(weights.shape) - weights).view(-1)
    new = (grid.dequantize(after).view(weights.shape) - weights).view(-1)
    changed, _ = grid.changed_codes(before, after)
    return Outcome(changed, float(torch.dot(old, old)), float(torch.dot(old, new)), float(torch.dot(new, new)))
