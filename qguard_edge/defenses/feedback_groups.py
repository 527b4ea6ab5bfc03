"""Error feedback for lattice formats, where eight weights share a code: group after group in place of column after column.

The same sum of terms as in `feedback_pass`, with the eight columns of a group in one term:

    e H e^T = sum over groups G of |(e_G - d_G) R_GG|^2,    d_G = -(sum over i before G of e_i R_iG) R_GG^-1

so a group is rounded from its centre `w_G + d_G`, and what is near is told by the metric `R_GG R_GG^T`: how much an error shows
in the output after later groups have made up for it as far as they can. The few points looked at are plain rounding's own, the
nearest to the centre, plainly and with the metric's diagonal for weights, and the nearest to the centre pushed on beyond the
first one's error, half and whole. One is drawn, by Boltzmann's distribution of their terms; the entropy of the draw is exact.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qguard_edge.defenses.feedback_pass import Factor, Uniform
from quant_grids.base import LARGEST_SQUARE
from quant_grids.lattice_base import GROUP, LatticeGrid

BLOCK = 128  # columns whose errors are fed on at once
PUSHES = (0.5, 1.0)


@dataclass(frozen=True)
class Groups:
    """Some rows of a matrix on their lattice, groups in the order of rounding.

    Attributes:
        weights: f32 `[rows, columns]`, full precision.
        error: f32 `[rows, columns]`, of plain rounding.
        index: int32 `[rows, groups, points]`, plain rounding's points.
        mark: uint8 `[rows, groups]`, and its marks.
        scale: f32 `[rows, groups]`; 0 where a group cannot be used and stays.
        inverse: f32 of the same shape, `1 / scale` or 0.
        shift: f32 of the same shape, in units of the scale.
    """

    weights: Tensor
    error: Tensor
    index: Tensor
    mark: Tensor
    scale: Tensor
    inverse: Tensor
    shift: Tensor


@dataclass(frozen=True)
class PassedGroups:
    """What a pass decided: points, marks, the new error in units of a weight, and the entropy of the draws in bits."""

    index: Tensor
    mark: Tensor
    error: Tensor
    bits: float


def groups_of(grid: LatticeGrid, blocks: Tensor, weights: Tensor, order: Tensor) -> Groups:
    """Take a slice of rows apart.

    Args:
        grid: of the format.
        blocks: uint8 `[n_blocks, type_size]`, plain.
        weights: f32 `[rows, columns]`, full precision.
        order: int64 `[columns]`, of the columns; those of a group stay together.
    """
    rows = len(weights)
    codes = grid.unpack(blocks)
    error = grid.dequantize(blocks).view(weights.shape) - weights
    scale = codes.scale.view(rows, -1).clone()
    inverse = 1.0 / scale
    usable = torch.isfinite(inverse) & (scale.square() < LARGEST_SQUARE)
    broken = ~(error.square() < LARGEST_SQUARE)
    usable &= ~broken.view(rows, -1, GROUP).any(2)
    if not bool(usable.all()):
        for array in (scale, inverse):
            array.masked_fill_(~usable, 0.0)
        error = error.masked_fill(broken, 0.0)
        weights = weights.masked_fill(broken, 0.0)
    shift = torch.zeros_like(scale) if codes.shift is None else codes.shift.view(rows, -1)
    index, mark = codes.index.view(rows, -1, codes.index.shape[1]), codes.mark.view(rows, -1)
    turn = order[::GROUP] // GROUP
    return Groups(weights[:, order], error[:, order], *(x[:, turn] for x in (index, mark, scale, inverse, shift)))


def repeated(groups: Groups, step: int, copies: int) -> Groups:
    """One of every `step` rows, several times over."""
    return Groups(*(torch.cat([getattr(groups, item.name)[::step]] * copies) for item in fields(groups)))


def lean_of_groups(groups: Groups, factor: Factor) -> Tensor:
    """What a lean of 1 takes off the centres, as `lean_shift` has it but not turned: f32 `[rows, columns]`."""
    if factor.feed is None:
        return groups.error.clone()
    scaled = torch.linalg.solve_triangular(factor.feed.T, groups.error, upper=False, left=False, unitriangular=True)
    whole: Tensor = scaled.contiguous()
    return whole.div_(factor.square)


def run_groups(
    grid: LatticeGrid,
    groups: Groups,
    factor: Factor,
    *,
    shift: Tensor | None = None,
    variance: float = 0.0,
    uniform: Uniform | None = None,
) -> PassedGroups:
    """One pass over the groups of each row.

    Args:
        grid: of the format.
        groups: of some rows.
        factor: of the layer's inputs.
        shift: f32 `[rows, columns]`, taken off the centres; overwritten.
        variance: sigma^2 of the draws; 0 takes the nearest.
        uniform: random numbers, needed for a variance above 0.
    """
    centre = groups.weights.clone() if shift is None else torch.sub(groups.weights, shift, out=shift)
    error, index, mark = torch.empty_like(centre), groups.index.clone(), groups.mark.clone()
    rows, columns = centre.shape
    within = _within(factor, columns)
    undo = torch.linalg.inv(within)
    metric = within * factor.square.sqrt().view(-1, 1, GROUP)
    draws = uniform(columns // GROUP, rows) if variance > 0 and uniform is not None else None
    bits = 0.0
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        for first in range(start, stop, GROUP):
            g, here, rest = first // GROUP, slice(first, first + GROUP), slice(first + GROUP, stop)
            wanted = groups.weights[:, here] + (centre[:, here] - groups.weights[:, here]) @ undo[g]
            choice = _Choice(grid, groups, g, wanted, metric[g])
            bits += choice.settle(variance, None if draws is None else draws[g])
            index[:, g], mark[:, g], error[:, here] = choice.index, choice.mark, choice.error
            if factor.feed is not None:
                centre[:, rest] -= choice.error @ factor.feed[here, rest]
        if factor.feed is not None:
            centre[:, stop:] -= error[:, start:stop] @ factor.feed[start:stop, stop:]
    return PassedGroups(index, mark, error, bits)


def _within(factor: Factor, columns: int) -> Tensor:
    """The feed inside each group: f32 `[groups, 8, 8]`, upper triangular with a diagonal of ones."""
    if factor.feed is None:
        return torch.eye(GROUP, device=factor.square.device).repeat(columns // GROUP, 1, 1)
    count = columns // GROUP
    return factor.feed.view(count, GROUP, count, GROUP).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


class _Choice:
    """The points that a group may take in each row, and the one that it takes.

    Attributes:
        index: int32 `[rows, points]`, chosen by `settle`.
        mark: uint8 `[rows]`.
        error: f32 `[rows, 8]`.
    """

    index: Tensor
    mark: Tensor
    error: Tensor

    def __init__(self, grid: LatticeGrid, groups: Groups, number: int, wanted: Tensor, metric: Tensor) -> None:
        self._weights = groups.weights[:, number * GROUP : (number + 1) * GROUP]
        scale, shift = groups.scale[:, number, None], groups.shift[:, number, None]
        target = wanted * groups.inverse[:, number, None] - shift
        plain = (groups.index[:, number], groups.mark[:, number])
        importance = metric.square().sum(1)
        weight = (importance / importance.mean()).expand_as(target).contiguous()
        first = grid.nearest(target, None)
        beyond = target - grid.vectors(*first)
        self._found = [plain, first, grid.nearest(target, weight)]
        self._found += [grid.nearest(target + push * beyond, weight) for push in PUSHES]
        self._vectors = torch.stack([grid.vectors(*found) for found in self._found])
        self._values = (self._vectors + shift) * scale
        self._cost = ((self._values - wanted) @ metric).square().sum(2)
        for later in range(1, len(self._found)):  # a point found twice counts once
            again = torch.zeros(len(target), dtype=torch.bool, device=target.device)
            for earlier in range(later):
                again |= (self._vectors[later] == self._vectors[earlier]).all(1)
            self._cost[later].masked_fill_(again, torch.inf)
        dead = groups.inverse[:, number] == 0
        if bool(dead.any()):
            self._cost[0].masked_fill_(dead, 0.0)
            self._cost[1:].masked_fill_(dead, torch.inf)
            self._values[0][dead] = (self._weights + groups.error[:, number * GROUP : (number + 1) * GROUP])[dead]

    def settle(self, variance: float, draw: Tensor | None) -> float:
        """Choose, the nearest or by a draw; returns the entropy of the draws in bits."""
        bits = 0.0
        if draw is None:
            chosen = self._cost.argmin(0)
        else:
            nearness = (self._cost / (-2.0 * variance)).softmax(0)
            chosen = (nearness.cumsum(0) < draw).sum(0).clamp_(max=len(self._found) - 1)
            bits = float(torch.special.entr(nearness).sum()) / 0.6931471805599453
        rows = torch.arange(len(chosen), device=chosen.device)
        self.index = torch.stack([index for index, _ in self._found])[chosen, rows]
        self.mark = torch.stack([mark for _, mark in self._found])[chosen, rows]
        self.error = self._values[chosen, rows] - self._weights
        return bits
