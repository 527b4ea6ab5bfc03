"""The loop of `feedback_pass` over the columns of a block: one column rounded, the next ones corrected, and so on.

A column is five small calls, so where they are made from is most of their time. TorchScript makes them without Python's lock:
several threads run the loop side by side, and a call takes half as long. The functions are ordinary Python, which they stay
where TorchScript is missing (torch does not support it from Python 3.14 on); the results are the same to the bit.

Every function changes `centre`, `codes` and `error` (f32 `[columns, rows]` of the block, as all that has a row per column) in
place. Their other arguments are:

    gaps      offset - weight
    lowest, highest   the codes that may be taken
    offset, scale, inverse   f32 `[sub-blocks, rows]`
    feed      f32 `[columns, columns]`
    sub       the sub-block of each column
"""

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOOP = threading.Lock()
"""Held by the loop where Python runs it: its calls are so small that two threads in it do little but hand Python's lock to
each other."""


def _even(
    centre: Tensor,
    codes: Tensor,
    error: Tensor,
    gaps: Tensor,
    lowest: Tensor,
    highest: Tensor,
    base: Tensor,
    scale: Tensor,
    inverse: Tensor,
    feed: Tensor,
    sub: list[int],
) -> None:
    centres, found, errors = centre.unbind(), codes.unbind(), error.unbind()
    low, high, gap, bases = lowest.unbind(), highest.unbind(), gaps.unbind(), base.unbind()
    scales, inverses = scale.unbind(), inverse.unbind()
    run = 16  # columns; TorchScript sees no constants of a module
    for first in range(0, len(sub), run):
        last = min(first + run, len(sub))
        # Errors of columns to come are still 0.
        before, shares = error[first:last].t(), feed[first:last, first:last].triu(1).unbind(1)
        for j in range(first, last):
            i = sub[j]
            if j > first:
                centres[j].addmv_(before, shares[j - first], alpha=-1.0)
            torch.addcmul(bases[j], centres[j], inverses[i], out=found[j]).round_()
            torch.clamp(found[j], low[j], high[j], out=found[j])
            torch.addcmul(gap[j], found[j], scales[i], out=errors[j])
        centre[last:].addmm_(feed[first:last, last:].t(), error[first:last], alpha=-1.0)


def round_in(table: Tensor, level: Tensor, noise: Tensor | None) -> Tensor:
    """Codes nearest to some levels of a table.

    Args:
        table: f32 `[levels]`, rising.
        level: f32, in the table's units; overwritten.
        noise: f32 of the same shape, in steps between codes; None: none.
    """
    low = torch.bucketize(level, table[1:-1])
    place = level.sub_(table[low]).div_(table.diff()[low])
    if noise is not None:
        place += noise
    return place.round_().add_(low)


def _by_table(
    centre: Tensor,
    codes: Tensor,
    error: Tensor,
    gaps: Tensor,
    lowest: Tensor,
    highest: Tensor,
    noise: Tensor | None,
    offset: Tensor,
    scale: Tensor,
    inverse: Tensor,
    feed: Tensor,
    sub: list[int],
    table: Tensor,
) -> None:
    run = 16
    for first in range(0, len(sub), run):
        last = min(first + run, len(sub))
        before, shares = error[first:last].t(), feed[first:last, first:last].triu(1)
        for j in range(first, last):
            i = sub[j]
            if j > first:
                centre[j].addmv_(before, shares[:, j - first], alpha=-1.0)
            level = (centre[j] - offset[i]).mul_(inverse[i])
            codes[j] = round_in(table, level, None if noise is None else noise[j])
            torch.clamp(codes[j], lowest[j], highest[j], out=codes[j])
            torch.addcmul(gaps[j], table[codes[j].int()], scale[i], out=error[j])
        centre[last:].addmm_(feed[first:last, last:].t(), error[first:last], alpha=-1.0)


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """The function in TorchScript, or under a lock where that is missing."""
    jit: Any = torch.jit
    scripted = sys.version_info < (3, 14)
    script = jit.script(function) if scripted else function

    def run(*arguments: Any) -> None:
        # As written: nothing is profiled, recorded or fused.
        with jit.optimized_execution(False):
            script(*arguments)

    def locked(*arguments: Any) -> None:
        with LOOP:
            function(*arguments)

    return run if scripted else locked


round_evenly = _compiled(_even)
round_by_table = _compiled(_by_table)
