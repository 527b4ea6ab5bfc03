"""Error feedback on a fixed grid: one pass over the columns of a matrix, drawn at random, bent to a constraint.

The algorithm
-------------
A layer computes `W x`. With the Gram matrix `H = mean of x x^T` of its inputs, an error `e` of a row changes the output by
`e H e^T` on average. Factor `H = R R^T`, R upper triangular. Then

    e H e^T = sum over j of R_jj^2 (e_j + sum over i < j of e_i R_ij / R_jj)^2

so column after column, each weight is rounded not from where it was but from its **centre**

    c_j = w_j - sum over i < j of e_i R_ij / R_jj

which makes up for the errors before it (arXiv 2210.17323, 2307.13304). Rounding the centre to the nearest level makes each term
small in turn. The levels are those that the format's blocks already have: no scale changes.

The draws
---------
A deterministic pass is a public rule that an attacker can aim at, and so is the *mean* of a random one. So each code is drawn:
with the centre a share `f` of the step above the lower of two levels,

    P(upper) = 1/2 + (f - 1/2) / width,   cut at 0 and 1

At width 1 this is stochastic rounding: given what was drawn before, the level's mean is the centre. By induction over the columns
the error of every weight then has mean zero, so over the seeds nothing is left to aim at but what the ends of the codes' range
(and `reach`) cut off. Of the draws without bias it has the least variance. Smaller widths cost less output error and leave more
in common; 0 rounds to the nearest level. (Klein's sampler, Boltzmann's distribution of the terms, leaves 1.5 to 3 times as
much in common for the same output error: docs/LOG.md, 2026-11-24.) Given the draws before it, a draw has the entropy
`-p log2 p - (1 - p) log2 (1 - p)`, so the sum of these estimates, without bias, how much about the result nobody can know who
does not know the seed. Drawing is rounding `c_j` plus uniform noise of `width` steps: the price of an addition.

The constraint
--------------
`T` is plain rounding's error, the vector that a conditioned backdoor is stored in. Minimising `e H e^T + 2 lean <e, T>` is the
same pass from the centres `c_j - lean y_j / R_jj`, with `R y = T`: what is taken off `<e, T>` is paid for where the layer's
output changes least. `lean` is found on a sample of rows such that `<e, T> = c <T, T>`; at width 1 hardly any is needed.

How it runs
-----------
Columns lie in one piece (`[columns, rows]`), in blocks of 128 within which runs of 16 are corrected one by one
(`feedback_loop`), so that nearly all arithmetic is matrix products. Rows do not depend on each other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qguard_edge.defenses.feedback_loop import round_by_table, round_evenly, round_in
from quant_grids.base import LARGEST_SQUARE, ScalarGrid, UniformGrid

BLOCK = 128
STRIP = 512  # rows of a Gram matrix that are turned at a time
DAMPING = 0.03  # of the mean of H's diagonal: keeps H invertible where the text left directions out


@dataclass(frozen=True)
class Factor:
    """What a pass needs to know about a layer's inputs; everything in the order of rounding.

    Attributes:
        order: int64 `[columns]`, the order in which columns are rounded.
        square: f32 `[columns]`, `R_jj^2`.
        feed: f32 `[columns, columns]`, `R_ij / R_jj`, with `R R^T = H` and R upper triangular; None where H is the identity.
    """

    order: Tensor
    square: Tensor
    feed: Tensor | None


def factor_of(gram: Tensor, order: Tensor, damping: float = DAMPING) -> Factor:
    """Factor a Gram matrix.

    Args:
        gram: f32 `[columns, columns]`, mean of `x x^T`; not modified. All zeros mean that nothing is known.
        order: int64 `[columns]`.
        damping: what is added to the diagonal, as a share of its mean.
    """
    mean = float(gram.diagonal().double().mean())
    if not mean > 0:
        return unknown(len(gram), gram.device)
    lower = _turned(gram, order.flip(0))
    lower.diagonal().add_(damping * mean)
    lower = lower.mT  # it is symmetric; and as columns, LAPACK factors it where it lies
    torch.linalg.cholesky(lower, out=lower)
    diagonal = lower.diagonal().flip(0)
    feed = torch.empty(gram.shape, device=gram.device)
    for rows in _strips(len(gram)):
        feed[rows] = lower[len(gram) - rows.stop : len(gram) - rows.start].flip(0, 1).div_(diagonal)
    return Factor(order, diagonal.square().float(), feed)


def _turned(gram: Tensor, order: Tensor) -> Tensor:
    """Rows and columns in another order, f64; without a second matrix in f32."""
    made = torch.empty(gram.shape, dtype=torch.float64, device=gram.device)
    for rows in _strips(len(gram)):
        made[rows] = gram[order[rows]][:, order].double()
    return made


def _strips(count: int) -> list[slice]:
    return [slice(start, min(start + STRIP, count)) for start in range(0, count, STRIP)]


def unknown(columns: int, device: torch.device) -> Factor:
    """The factor of inputs that nobody saw: independent and of equal size."""
    return Factor(torch.arange(columns, device=device), torch.ones(columns, device=device), None)


@dataclass(frozen=True)
class Columns:
    """Some rows of a matrix on their grid, turned so that a column lies in one piece, in the order of rounding.

    `value = scale * level(code) + offset`, with `level(code) = code` for evenly spaced levels.

    Attributes:
        weights: f32 `[columns, rows]`, full precision.
        error: f32 `[columns, rows]`, of plain rounding.
        scale: f32 `[sub-blocks of a row, rows]`.
        inverse: f32 of the same shape, `1 / scale`; 0 where a sub-block cannot be used, whose codes then stay.
        offset: f32 of the same shape.
        sub: int64 `[columns]`, the sub-block of each column.
        lowest: f32 `[columns, rows]`, the lowest code that may be taken.
        highest: the highest.
        table: f32 `[levels]` where the levels are not evenly spaced.
    """

    weights: Tensor
    error: Tensor
    scale: Tensor
    inverse: Tensor
    offset: Tensor
    sub: Tensor
    lowest: Tensor
    highest: Tensor
    table: Tensor | None

    def place(self, at: slice) -> Tensor:
        """Where the weights of some columns lie between the codes, f32 `[n, rows]`."""
        sub = self.sub[at]
        level = (self.weights[at] - self.offset[sub]).mul_(self.inverse[sub])
        return level if self.table is None else place_in(self.table, level)


def place_in(table: Tensor, level: Tensor) -> Tensor:
    """Codes with a fraction, by straight lines between the levels of a table; beyond its ends the outermost lines go on."""
    low = torch.bucketize(level, table[1:-1])  # 0 to levels - 2
    below, gap = table[low], table.diff()[low]
    return ((level - below) / gap).add_(low)


def columns_of(grid: ScalarGrid, blocks: Tensor, weights: Tensor, order: Tensor, reach: int) -> Columns:
    """Turn a slice of rows.

    Args:
        grid: of the format.
        blocks: uint8 `[n_blocks, type_size]`, plain.
        weights: f32 `[rows, columns]`, full precision.
        order: of the columns.
        reach: how many codes beyond the two next to the weight may be taken, to either side.
    """
    rows = len(weights)
    parts = grid.unpack(blocks)
    scale = parts.scale.view(rows, -1).T.contiguous()
    offset = torch.zeros_like(scale) if parts.offset is None else parts.offset.view(rows, -1).T.contiguous()
    inverse = 1.0 / scale
    usable = torch.isfinite(inverse) & (scale.square() < LARGEST_SQUARE) & torch.isfinite(offset * inverse)
    sub = order // grid.sub_size
    codes = parts.codes.view(rows, -1).T.contiguous()[order]
    table, lowest, highest = grid.level_table(blocks.device), 0.0, len(grid.levels) - 1.0
    even = isinstance(grid, UniformGrid)
    if isinstance(grid, UniformGrid):
        offset.add_(scale, alpha=grid.first_level)
        lowest, highest = float(grid.lowest_target - grid.first_level), float(grid.highest_target - grid.first_level)
    value = (codes.float() if even else table[codes.int()]).mul_(scale[sub]).add_(offset[sub])
    turned = weights.T.contiguous()[order]
    error = value - turned
    if not bool(usable.all() & torch.isfinite(error.sum())):
        # Blocks without a scale stay as they are; what is not a number counts as rounded without an error.
        for array in (inverse, scale):
            array.masked_fill_(~usable, 0.0)
        offset.nan_to_num_(0.0, 0.0, 0.0)
        broken = ~(error.square() < LARGEST_SQUARE)
        turned = torch.where(broken, value.clamp(-1e15, 1e15).nan_to_num(0.0), turned)
        error.masked_fill_(broken, 0.0)
    found = Columns(turned, error, scale, inverse, offset, sub, error, error, None if even else table)
    below = found.place(slice(None)).floor_()
    return replace(
        found,
        lowest=(below - reach).clamp_(lowest, highest),
        highest=below.add_(1 + reach).clamp_(lowest, highest),
    )


@dataclass(frozen=True)
class Passed:
    """What a pass decided.

    Attributes:
        codes: f32 `[columns, rows]`, whole numbers, in the order of rounding.
        error: f32 `[columns, rows]`, the new error in units of a weight.
        bits: entropy of the draws.
    """

    codes: Tensor
    error: Tensor
    bits: float


def stacked(columns: Columns, step: int, copies: int) -> Columns:
    """One of every `step` rows, several times over."""
    names = ("weights", "error", "scale", "inverse", "offset", "lowest", "highest")
    return replace(columns, **{name: getattr(columns, name)[:, ::step].repeat(1, copies) for name in names})


Uniform = Callable[[int, int], Tensor]
"""Independent numbers in (0, 1), f32 of the given shape."""


def lean_shift(columns: Columns, factor: Factor) -> Tensor:
    """What a lean of 1 takes off the centres: f32 `[columns, rows]`, `y_j / R_jj` with `R y = T`."""
    if factor.feed is None:
        return columns.error.clone()
    # Turned, so that neither side is copied to LAPACK's order of columns.
    scaled = torch.linalg.solve_triangular(factor.feed.T, columns.error.T, upper=False, left=False, unitriangular=True)
    turned: Tensor = scaled.T.contiguous()
    return turned.div_(factor.square.unsqueeze(1))  # R = feed * diagonal


def run_pass(
    columns: Columns,
    factor: Factor,
    *,
    shift: Tensor | None = None,
    width: float = 0.0,
    uniform: Uniform | None = None,
    measured: bool = True,
) -> Passed:
    """One pass over the columns.

    Args:
        columns: of some rows.
        factor: of the layer's inputs.
        shift: f32 `[columns, rows]`, taken off the centres, see `lean_shift`; overwritten.
        width: of the draws, in steps between codes; 0 rounds to the nearest code.
        uniform: random numbers, needed for a width above 0.
        measured: whether the entropy of the draws is wanted; 0 else.
    """
    centre = columns.weights.clone() if shift is None else torch.sub(columns.weights, shift, out=shift)
    codes, error = torch.empty_like(centre), torch.zeros_like(centre)
    bits, count = 0.0, len(centre)
    for start in range(0, count, BLOCK):
        block = slice(start, min(start + BLOCK, count))
        noise = None
        if width > 0 and uniform is not None:
            noise = uniform(block.stop - block.start, centre.shape[1]).sub_(0.5).mul_(width)
        if factor.feed is None:
            _round_at_once(columns, block, centre, codes, error, noise)
        else:
            _round_block(columns, factor.feed, block, centre, codes, error, noise)
            centre[block.stop :].addmm_(factor.feed[block, block.stop :].T, error[block], alpha=-1.0)
        if noise is not None and measured:
            bits += _entropy(columns, block, centre[block], width)
    return Passed(codes, error, bits)


def _round_block(
    columns: Columns,
    feed: Tensor,
    block: slice,
    centre: Tensor,
    codes: Tensor,
    error: Tensor,
    noise: Tensor | None,
) -> None:
    """Round the columns of a block one after the other; their centres are then final."""
    sub = columns.sub[block].tolist()
    # Everything that does not depend on the centres, so that a column takes as few calls as may be.
    gaps = columns.offset[sub] - columns.weights[block]
    rows = centre[block], codes[block], error[block], gaps, columns.lowest[block], columns.highest[block]
    if columns.table is None:
        base = (columns.offset * columns.inverse)[sub].neg_()
        if noise is not None:
            base += noise
        round_evenly(*rows, base, columns.scale, columns.inverse, feed[block, block], sub)
    else:
        round_by_table(*rows, noise, columns.offset, columns.scale, columns.inverse, feed[block, block], sub, columns.table)


def _round_at_once(
    columns: Columns, block: slice, centre: Tensor, codes: Tensor, error: Tensor, noise: Tensor | None
) -> None:
    """Round the columns of a block whose errors nothing makes up for."""
    sub = columns.sub[block]
    place = (centre[block] - columns.offset[sub]).mul_(columns.inverse[sub])
    if columns.table is None:
        found = (place if noise is None else place.add_(noise)).round_()
    else:
        found = round_in(columns.table, place, noise)
    torch.clamp(found, columns.lowest[block], columns.highest[block], out=codes[block])
    level = codes[block] if columns.table is None else columns.table[codes[block].int()]
    torch.addcmul(columns.offset[sub], level, columns.scale[sub], out=error[block]).sub_(columns.weights[block])


def _entropy(columns: Columns, block: slice, centre: Tensor, width: float) -> float:
    """Bits in the draws of a block, whose centres are final.

    Args:
        columns: of some rows.
        block: which of their columns.
        centre: f32 `[n, rows]`.
        width: of the draws.
    """
    sub = columns.sub[block]
    place = (centre - columns.offset[sub]).mul_(columns.inverse[sub])
    if columns.table is not None:
        low = torch.bucketize(place, columns.table[1:-1])
        place.sub_(columns.table[low]).div_(columns.table.diff()[low]).add_(low)
    undecided = (place > columns.lowest[block]) & (place < columns.highest[block]) & (columns.inverse != 0)[sub]
    upper = place.sub_(place.floor()).sub_(0.5).div_(width).add_(0.5).clamp_(0.0, 1.0)
    nats = torch.special.entr(upper).add_(torch.special.entr(1.0 - upper))
    return float((nats * undecided).sum()) / math.log(2.0)
