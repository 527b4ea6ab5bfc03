"""Move full-precision weights so that an unmodified quantizer of bitsandbytes rounds them to hardened codes.

The other way round from a checkpoint with chosen codes: the file stays in full precision, whoever loads it with
`load_in_4bit` or `load_in_8bit` gets the hardened rounding with bitsandbytes' own quantizer, unchanged.

How
---
A code has a *cell*: the interval of weights that round to it while the scale stays. Scales are largest magnitudes, so the
weights that set one are not moved, and no other may grow beyond it. Then, format by format, coarsest cells first:

1. the unmodified quantizer gives the plain codes, and the defense chooses flips among those that are still *open*:
   both the cell of the code and that of its flip meet the interval that the formats before have left to the weight;
2. a weight that an earlier format has moved out of its own cell gets the code of where it stands now;
3. the interval shrinks to its intersection with the cell of the chosen code.

At the end each weight takes the point of its interval nearest to where it was. So one folder serves all three formats, each
planned code is really reached, and where the intervals of three independent plans would not meet, the later format gives up
its flip (`Moved.given_up` counts them): a coarse format moves a weight by many steps of INT8, whose error there is then a new
one, not the attacker's.

Cells are shrunk by a margin at both ends, since other builds round a little differently (INT8 casts to fp16 first), and to
numbers that the folder's dtype can hold. Where nothing is left the margin is given up, and after it the flip. A weight that
keeps its code is not moved at all.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convert.bnb_check import really_quantized
from convert.tensor_io import RowSlice
from qguard_edge.defenses.base import Defense, SliceKey
from qguard_edge.rounding.bnb import slices_of_rows
from qguard_edge.rounding.choose import choose_rounding, measured_outcome
from quant_grids import Flips, Outcome
from quant_grids.base import ScalarFlips
from quant_grids.bnb import BnbGrid, bnb_grid

COARSEST_FIRST = ("fp4", "nf4", "int8")
MARGINS = {"fp4": 0.01, "nf4": 0.01, "int8": 0.1}  # share of a cell left free at each end


@dataclass(frozen=True)
class KindPlan:
    """One format's part of a moved matrix.

    Attributes:
        kind: nf4, fp4 or int8.
        outcome: what the planned codes change.
        given_up: weights that an earlier format had moved out of the cell of their plain code.
        reproduced: codes that the unmodified quantizer of bitsandbytes gives as planned; None: not checked.
    """

    kind: str
    outcome: Outcome
    given_up: int
    reproduced: int | None


@dataclass(frozen=True)
class Moved:
    """A moved matrix.

    Attributes:
        weights: of the shape and dtype given.
        plans: per format.
        n_moved: weights that differ from the original.
    """

    weights: Tensor
    plans: tuple[KindPlan, ...]
    n_moved: int


@dataclass(frozen=True)
class _Interval:
    """Where each weight may go, and where it was: f32 `[n]`, flat."""

    weights: Tensor
    low: Tensor
    high: Tensor

    def nearest(self) -> Tensor:
        """The allowed point nearest to each weight."""
        return torch.minimum(torch.maximum(self.weights, self.low), self.high)


def move_weights(
    weights: Tensor,
    kinds: Sequence[str],
    defense: Defense[Any],
    *,
    key: Callable[[str, int], SliceKey],
    pool: ThreadPoolExecutor,
    check: bool,
) -> Moved:
    """Plan one matrix for some formats and move it.

    Args:
        weights: `[rows, columns]`, in the dtype that the folder will have.
        kinds: formats, in any order.
        defense: chooses flips; one that would re-quantize chooses flips as well.
        key: random numbers of a slice, from the format and the slice's number.
        pool: threads.
        check: test with bitsandbytes whether the codes are reached.
    """
    grids = {kind: bnb_grid(kind, weights.shape[1]) for kind in COARSEST_FIRST if kind in kinds}
    interval = _interval_of(weights, grids.values())
    planned: dict[str, tuple[Tensor, Outcome, int]] = {}
    for kind, grid in grids.items():
        planner = _Planner(grid, weights, interval, defense)
        planned[kind] = planner.run(key, pool)
        interval = planner.interval
    moved = interval.nearest().view(weights.shape).to(weights.dtype)
    plans = []
    for kind, (blocks, outcome, given_up) in planned.items():
        reproduced = _reproduced(moved, grids[kind], blocks) if check else None
        plans.append(KindPlan(kind, outcome, given_up, reproduced))
    return Moved(moved, tuple(plans), int((moved != weights).sum()))


def _interval_of(weights: Tensor, grids: Iterable[BnbGrid]) -> _Interval:
    """The interval that keeps every scale of every format as it is."""
    flat = weights.reshape(-1).float()
    interval = _Interval(flat, torch.full_like(flat, -torch.inf), torch.full_like(flat, torch.inf))
    for grid in grids:
        scale = grid.scales(grid.quantize(weights)).repeat_interleave(grid.block_size)[: len(flat)]
        reach = torch.maximum(scale, flat.abs())
        fixed = grid.sets_scale(weights).reshape(-1)[: len(flat)]
        low, high = torch.maximum(interval.low, -reach), torch.minimum(interval.high, reach)
        interval = _Interval(flat, torch.where(fixed, flat, low), torch.where(fixed, flat, high))
    return interval


class _Planner:
    """One format's turn; `interval` is what it leaves to the next."""

    def __init__(self, grid: BnbGrid, weights: Tensor, interval: _Interval, defense: Defense[Any]) -> None:
        self.grid, self.weights, self.interval, self.defense = grid, weights, interval, defense
        self.rows = grid.as_rows(weights)
        self.plain = grid.quantize(weights)
        self.codes = self.plain.clone()
        self.per_row = self.rows.shape[1] // grid.block_size
        codes = grid.unpack(self.plain).codes
        low, high = self._cell(self.plain, codes)
        # A weight is in its own cell, however close to the edge: who keeps the code need not move.
        self.stay_low, self.stay_high = torch.minimum(low, interval.weights), torch.maximum(high, interval.weights)
        self.stays = torch.maximum(interval.low, self.stay_low) <= torch.minimum(interval.high, self.stay_high)

    def run(self, key: Callable[[str, int], SliceKey], pool: ThreadPoolExecutor) -> tuple[Tensor, Outcome, int]:
        """The planned blocks, what they change, and how many weights had lost their cell before."""
        choose_rounding(
            self.grid,
            self.defense,
            slices_of_rows(self.rows),
            flips_of=self._open_flips,
            key_of=lambda part: key(self.grid.kind_name, part.index),
            sink=self._keep,
            pool=pool,
        )
        with torch.inference_mode():
            outcome = self._settle()
        return self.codes, outcome, int((~self.stays).sum())

    def _cell(self, blocks: Tensor, codes: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """The cells of some codes, in numbers that the dtype can hold.

        Args:
            blocks: all blocks or those of a slice, whose scales count.
            codes: of these blocks.
            first: position of their first weight in the matrix.

        Returns:
            Lower and upper ends, f32 `[n]`, without the padding at the end of the matrix; low > high where a cell is empty.
        """
        n = min(codes.numel(), len(self.interval.weights) - first)
        low, high = (end.reshape(-1)[:n] for end in self.grid.cells(blocks, codes))
        margin = MARGINS[self.grid.kind_name] * (high - low)
        tight = _held(low + margin, high - margin, self.weights.dtype)
        wide = _held(low, high, self.weights.dtype)
        fits = tight[0] <= tight[1]
        return torch.where(fits, tight[0], wide[0]), torch.where(fits, tight[1], wide[1])

    def _blocks(self, part: RowSlice, of: Tensor) -> Tensor:
        return of[part.start * self.per_row : part.stop * self.per_row]

    def _open_flips(self, part: RowSlice) -> tuple[Tensor, Flips]:
        """The flips of a slice that are still open; the others are not there as far as the defense can see."""
        blocks, rows = self._blocks(part, self.plain), self.rows[part.start : part.stop]
        flips = self.grid.flips(blocks, rows)
        assert isinstance(flips, ScalarFlips)
        first, last = part.start * self.rows.shape[1], part.stop * self.rows.shape[1]
        target = flips.codes + flips.step.view(flips.codes.shape).to(torch.int8).view(torch.uint8)
        low, high = self._cell(blocks, target, first)
        # Beyond the end of the matrix (padding) nothing is open.
        open_flat = torch.zeros(last - first, dtype=torch.bool, device=blocks.device)
        here = slice(first, min(last, len(self.interval.weights)))
        meets = torch.maximum(low, self.interval.low[here]) <= torch.minimum(high, self.interval.high[here])
        open_flat[: len(meets)] = meets & self.stays[here]
        stays = torch.ones(last - first, dtype=torch.bool, device=blocks.device)
        stays[: len(meets)] = self.stays[here]
        usable = open_flat.view(rows.shape) & (flips.step != 0)
        error = flips.error.view(len(flips.square), -1) * stays.view(len(flips.square), -1)
        energy = (error * error * flips.square).view(flips.energy.shape[0], -1, self.grid.block_size).sum(-1)
        mask = usable.float()
        return blocks, replace(
            flips, ratio=flips.ratio * mask, gain=flips.gain * mask, step=flips.step * mask, energy=energy
        )

    def _keep(self, part: RowSlice, changed: Tensor) -> None:
        self._blocks(part, self.codes)[:] = changed

    def _settle(self) -> Outcome:
        """Give the weights that lost their cell the code of where they stand, and shrink the interval."""
        grid, n = self.grid, len(self.interval.weights)
        chosen, before = grid.unpack(self.codes).codes, grid.unpack(self.plain).codes
        if not bool(self.stays.all()):
            standing = grid.quantize(self.interval.nearest().view(self.weights.shape))
            lost = torch.zeros(chosen.numel(), dtype=torch.bool, device=chosen.device)
            lost[:n] = ~self.stays
            chosen = torch.where(lost.view(chosen.shape), grid.unpack(standing).codes, chosen)
            self.codes = grid.pack(self.codes, chosen)
        low, high = self._cell(self.plain, chosen)
        kept = (chosen == before).reshape(-1)[:n] & self.stays
        low, high = torch.where(kept, self.stay_low, low), torch.where(kept, self.stay_high, high)
        # Who stands in a cell by now is in it, however close to the edge.
        point = self.interval.nearest()
        low = torch.where(self.stays, low, torch.minimum(low, point))
        high = torch.where(self.stays, high, torch.maximum(high, point))
        self.interval = _Interval(
            self.interval.weights, torch.maximum(self.interval.low, low), torch.minimum(self.interval.high, high)
        )
        return measured_outcome(grid, self.plain, self.codes, self.rows)


def _reproduced(moved: Tensor, grid: BnbGrid, planned: Tensor) -> int:
    """Codes that bitsandbytes gives to the moved weights as planned."""
    real = really_quantized(moved, grid)
    same = grid.unpack(real).codes == grid.unpack(planned).codes
    same &= (grid.scales(real) == grid.scales(planned)).unsqueeze(1)
    return int(same.view(-1)[: moved.numel()].sum())


def _held(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number that a dtype can hold between two f32 ends; low > high where there is none."""
    if dtype == torch.float32:
        return low, high
    return _rounded_up(low, dtype), -_rounded_up(-high, dtype)


def _rounded_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    """f32 values as the next number that a 16-bit dtype can hold, upwards."""
    near = values.to(dtype)
    bits = near.view(torch.int16)
    # The next larger number: one more as an integer if positive, one less in magnitude if negative.
    above = torch.where(bits < 0, torch.where(bits == -32768, torch.ones_like(bits), bits - 1), bits + 1)
    return torch.where(near.float() < values, above.view(dtype).float(), near.float())
