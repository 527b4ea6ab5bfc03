"""Error feedback, drawn at random and bent to the alignment constraint: the rule `feedback`.

The idea
--------
Where the inputs of a matrix are known (their Gram matrix, seen while the full-precision model reads some text), the error that
rounding makes in one weight can be made up for in the next ones. So a file on plain rounding's own scales comes much nearer
to full precision than plain rounding, and what is gained pays for the two things that defend it: no more than a share `c` of
plain rounding's error may be left (`<t', t> = c <t, t>`, see `ortho`), and every code is drawn at random, so that little error is
the same for all seeds. `feedback_pass` has the algorithm.

Per matrix
----------
`fit` factors the Gram matrix and finds, on a sample of rows, how far the pass must lean away from plain rounding's error;
`FittedPass.round` then rounds any slice of rows, whichever thread asks. A matrix whose inputs nobody saw (an embedding that is
no output matrix) is treated as if they were independent: nothing is made up for, the draws and the constraint stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qguard_edge.defenses.base import Defense, JoinedKey, MatrixRule, Rounded, SliceKey
from qguard_edge.defenses.feedback_groups import Groups, groups_of, lean_of_groups, repeated, run_groups
from qguard_edge.defenses.feedback_pass import (
    DAMPING,
    Columns,
    Factor,
    Uniform,
    columns_of,
    factor_of,
    lean_shift,
    run_pass,
    stacked,
    unknown,
)
from qguard_edge.defenses.lean import find_lean
from qguard_edge.defenses.options import FeedbackOptions
from quant_grids import Flips, Grid, Outcome
from quant_grids.base import ScalarGrid
from quant_grids.errors import UnsupportedError
from quant_grids.lattice_base import GROUP, LatticeGrid


@dataclass(frozen=True)
class Tuning:
    """What a study varies and users do not.

    Attributes:
        damping: see `factor_of`.
        order: of the columns: natural, random, or falling (by the mean square of their inputs).
        reach: see `columns_of`.
    """

    damping: float = DAMPING
    order: str = "falling"
    reach: int = 1

    def order_of(self, gram: Tensor, group: int = 1) -> Tensor:
        """int64 `[columns]`; columns that share a code, `group` of them, stay together."""
        size = gram.diagonal().view(-1, group).mean(1)
        turn = torch.arange(len(size))
        if self.order == "falling":
            turn = torch.argsort(size, descending=True, stable=True)
        elif self.order == "random":
            turn = torch.randperm(len(size), generator=torch.Generator().manual_seed(0))
        turn = turn.to(gram.device)
        return (turn.unsqueeze(1) * group + torch.arange(group, device=gram.device)).flatten()


class Feedback(Defense[FeedbackOptions]):
    """See the module docstring."""

    wants_inputs = True
    tuning = Tuning()

    def choose(self, flips: Flips, key: SliceKey, share: Any = None) -> Tensor:
        """Flips do not say enough.

        Raises:
            UnsupportedError: always; see `fit`.
        """
        raise UnsupportedError("--defense feedback needs to know what each matrix is fed; use --defense ortho")

    def factor(self, grid: Grid, gram: Tensor | None, columns: int, device: torch.device) -> Factor:
        """See `Defense.factor`."""
        if gram is None:
            return unknown(columns, device)
        return factor_of(gram, self.tuning.order_of(gram, grid.weights_per_code), self.tuning.damping)

    def fit(self, grid: Grid, factor: Factor, blocks: Tensor, weights: Tensor, key: SliceKey) -> MatrixRule:
        """See `Defense.fit`."""
        target = self.options.alignment
        uniform = key.uniform(weights.device)
        if isinstance(grid, LatticeGrid):
            groups = groups_of(grid, blocks, weights, factor.order)
            variance = self.options.width**2 * mean_cost(groups.error.T, factor)
            return FittedGroups(grid, factor, lean_for_groups(grid, groups, factor, variance, target, uniform), variance)
        assert isinstance(grid, ScalarGrid)
        columns = columns_of(grid, blocks, weights, factor.order, self.tuning.reach)
        width = self.options.width
        return FittedPass(grid, factor, lean_for(columns, factor, width, target, uniform), width, self.tuning.reach)


@dataclass(frozen=True)
class FittedPass(MatrixRule):
    """A pass over one matrix.

    Attributes:
        grid: of the format.
        factor: of its inputs.
        lean: how strongly plain rounding's error is avoided.
        width: of the draws.
        reach: see `columns_of`.
    """

    grid: ScalarGrid
    factor: Factor
    lean: float
    width: float
    reach: int
    draws = True

    def round(self, blocks: Tensor, weights: Tensor, key: SliceKey | JoinedKey) -> Rounded:
        """See `MatrixRule.round`."""
        columns = columns_of(self.grid, blocks, weights, self.factor.order, self.reach)
        shift = lean_shift(columns, self.factor).mul_(self.lean) if self.lean else None
        passed = run_pass(columns, self.factor, shift=shift, width=self.width, uniform=key.uniform(weights.device))
        before = self.grid.unpack(blocks).codes
        turned = torch.empty_like(passed.codes)
        turned[self.factor.order] = passed.codes
        codes = turned.T.to(torch.uint8).contiguous().view(before.shape)
        sub_size = self.grid.sub_size
        dead = (columns.inverse == 0).T.reshape(-1)
        if bool(dead.any()):
            codes = torch.where(dead.unsqueeze(1), before.view(-1, sub_size), codes.view(-1, sub_size)).view(before.shape)
        outcome = _outcome(int(torch.count_nonzero(codes != before)), columns.error, passed.error)
        return Rounded(self.grid.pack(blocks, codes), outcome, passed.bits)


@dataclass(frozen=True)
class FittedGroups(MatrixRule):
    """A pass over one matrix of a lattice format; as `FittedPass`, with the `variance` of `run_groups`."""

    grid: LatticeGrid
    factor: Factor
    lean: float
    variance: float
    draws = True

    def round(self, blocks: Tensor, weights: Tensor, key: SliceKey | JoinedKey) -> Rounded:
        """See `MatrixRule.round`."""
        groups = groups_of(self.grid, blocks, weights, self.factor.order)
        shift = lean_of_groups(groups, self.factor).mul_(self.lean) if self.lean else None
        uniform = key.uniform(weights.device)
        passed = run_groups(self.grid, groups, self.factor, shift=shift, variance=self.variance, uniform=uniform)
        changed = (passed.index != groups.index).any(2) | (passed.mark != groups.mark)
        outcome = _outcome(int(torch.count_nonzero(changed)), groups.error, passed.error)
        index, mark = torch.empty_like(passed.index), torch.empty_like(passed.mark)
        turn = self.factor.order[::GROUP] // GROUP
        index[:, turn], mark[:, turn] = passed.index, passed.mark
        return Rounded(self.grid.pack(blocks, index.flatten(0, 1), mark.flatten()), outcome, passed.bits)


def _outcome(n_changed: int, old: Tensor, new: Tensor) -> Outcome:
    old, new = old.reshape(-1), new.reshape(-1)
    return Outcome(n_changed, *(float(torch.dot(a, b)) for a, b in ((old, old), (old, new), (new, new))))


def mean_cost(error: Tensor, factor: Factor) -> float:
    """What plain rounding costs on average in one term of the output error: the mean of `R_jj^2 T_j^2`.

    Args:
        error: f32 `[columns, rows]`, of plain rounding, in the factor's order.
        factor: of the layer's inputs.
    """
    return float((error.square().mean(1) * factor.square).mean())


def lean_for(columns: Columns, factor: Factor, width: float, target: float, uniform: Uniform) -> float:
    """The lean at which a pass over these rows keeps `<t', t> = target <t, t>`; 0 if none is needed."""
    energy = float(columns.error.square().sum())
    if energy <= 0 or target >= 1.0:
        return 0.0
    shift = lean_shift(columns, factor)

    def alignments(leans: Sequence[float], step: int) -> list[float]:
        several = stacked(columns, step, len(leans))
        shifts = torch.cat([shift[:, ::step] * lean for lean in leans], dim=1)
        passed = run_pass(several, factor, shift=shifts, width=width, uniform=uniform, measured=False)
        old = several.error.view(len(shift), len(leans), -1)
        new = passed.error.view(old.shape)
        return [float(share) for share in (new * old).sum((0, 2)) / old.square().sum((0, 2))]

    return find_lean(alignments, energy / max(1e-30, float((shift * shift * factor.square.unsqueeze(1)).sum())), target)


def lean_for_groups(
    grid: LatticeGrid, groups: Groups, factor: Factor, variance: float, target: float, uniform: Uniform
) -> float:
    """As `lean_for`."""
    energy = float(groups.error.square().sum())
    if energy <= 0 or target >= 1.0:
        return 0.0
    shift = lean_of_groups(groups, factor)

    def alignments(leans: Sequence[float], step: int) -> list[float]:
        several = repeated(groups, step, len(leans))
        shifts = torch.cat([shift[::step] * lean for lean in leans])
        passed = run_groups(grid, several, factor, shift=shifts, variance=variance, uniform=uniform)
        old, new = several.error.view(len(leans), -1), passed.error.view(len(leans), -1)
        return [float(share) for share in (new * old).sum(1) / old.square().sum(1)]

    return find_lean(alignments, energy / max(1e-30, float((shift * shift * factor.square).sum())), target)
