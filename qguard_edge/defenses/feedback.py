"""Error feedback, drawn at a temperature and bent to the alignment constraint: the rule `feedback`.

The idea
--------
Where the inputs of a matrix are known (their Gram matrix, seen while the full-precision model reads some text), the error that
rounding makes in one weight can be made up for in the next ones. So a file on plain rounding's own scales comes much nearer
to full precision than plain rounding, and what is gained pays for the two things that defend it: no more than a share `c` of
plain rounding's error may be left (`<t', t> = c <t, t>`, see `ortho`), and every code is drawn at random as far as the output
bears it. `feedback_pass` has the algorithm.

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

from qguard_edge.defenses.base import Defense, MatrixRule, Rounded, SliceKey
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
from qguard_edge.defenses.options import FeedbackOptions
from quant_grids import Flips, Grid, Outcome
from quant_grids.base import ScalarGrid

SAMPLE_ROWS = 96
"""Rows that the lean is found on: the alignment of the whole matrix then meets the target to about 0.01."""
LEANS = (0.0, 0.35, 0.7, 1.1)
"""Tried at once, in units of the lean that would take a share of 1 off the alignment if codes were not whole numbers."""
CLOSE = 0.005
ALIGNMENT, TEMPERATURE = 0.0, 0.3


@dataclass(frozen=True)
class Tuning:
    """What a study varies and users do not.

    Attributes:
        damping: see `factor_of`.
        order: of the columns: natural, random, or falling (by the mean square of their inputs).
        reach: see `columns_of`.
    """

    damping: float = DAMPING
    order: str = "natural"
    reach: int | None = 0

    def order_of(self, gram: Tensor) -> Tensor:
        """int64 `[columns]`."""
        if self.order == "falling":
            return torch.argsort(gram.diagonal(), descending=True, stable=True)
        if self.order == "random":
            return torch.randperm(len(gram), generator=torch.Generator().manual_seed(0)).to(gram.device)
        return torch.arange(len(gram), device=gram.device)


class Feedback(Defense[FeedbackOptions]):
    """See the module docstring."""

    wants_inputs = True
    tuning = Tuning()

    def choose(self, flips: Flips, key: SliceKey, share: Any = None) -> Tensor:
        """Flips do not say enough; see `fit`."""
        raise NotImplementedError

    def factor(self, gram: Tensor | None, columns: int, device: torch.device) -> Factor:
        """See `Defense.factor`."""
        if gram is None:
            return unknown(columns, device)
        return factor_of(gram, self.tuning.order_of(gram), self.tuning.damping)

    def fit(self, grid: Grid, factor: Factor, blocks: Tensor, weights: Tensor, key: SliceKey) -> MatrixRule:
        """See `Defense.fit`."""
        assert isinstance(grid, ScalarGrid)
        target = ALIGNMENT if self.options.alignment is None else self.options.alignment
        temperature = TEMPERATURE if self.options.temperature is None else self.options.temperature
        columns = columns_of(grid, blocks, weights, factor.order, self.tuning.reach)
        variance = temperature * mean_cost(columns, factor)
        lean = lean_for(columns, factor, variance, target, key.uniform(weights.device))
        return FittedPass(grid, factor, lean, variance, self.tuning.reach)


@dataclass(frozen=True)
class FittedPass(MatrixRule):
    """A pass over one matrix.

    Attributes:
        grid: of the format.
        factor: of its inputs.
        lean: how strongly plain rounding's error is avoided.
        variance: of the draws.
        reach: see `columns_of`.
    """

    grid: ScalarGrid
    factor: Factor
    lean: float
    variance: float
    reach: int | None

    def round(self, blocks: Tensor, weights: Tensor, key: SliceKey) -> Rounded:
        """See `MatrixRule.round`."""
        columns = columns_of(self.grid, blocks, weights, self.factor.order, self.reach)
        shift = lean_shift(columns, self.factor).mul_(self.lean) if self.lean else None
        passed = run_pass(columns, self.factor, shift=shift, variance=self.variance, uniform=key.uniform(weights.device))
        before = self.grid.unpack(blocks).codes
        turned = torch.empty_like(passed.codes)
        turned[self.factor.order] = passed.codes
        codes = turned.T.to(torch.uint8).contiguous().view(before.shape)
        sub_size = self.grid.sub_size
        dead = (columns.inverse == 0).T.reshape(-1)
        if bool(dead.any()):
            codes = torch.where(dead.unsqueeze(1), before.view(-1, sub_size), codes.view(-1, sub_size)).view(before.shape)
        old, new = columns.error.view(-1), passed.error.view(-1)
        outcome = Outcome(
            int(torch.count_nonzero(codes != before)),
            float(torch.dot(old, old)),
            float(torch.dot(old, new)),
            float(torch.dot(new, new)),
        )
        return Rounded(self.grid.pack(blocks, codes), outcome, passed.bits)


def mean_cost(columns: Columns, factor: Factor) -> float:
    """What rounding to the nearest level costs on average in one term of the output error: the mean of `R_jj^2 s^2 / 12`."""
    gap = 1.0 if columns.table is None else float(columns.table.diff().median())
    square = columns.scale.square().mean(1)[columns.sub]
    return float((square * factor.square).mean()) * gap * gap / 12.0


def lean_for(columns: Columns, factor: Factor, variance: float, target: float, uniform: Uniform) -> float:
    """The lean at which a pass over these rows keeps `<t', t> = target <t, t>`; 0 if none is needed.

    All leans of a round are tried in one pass, over copies of the rows.
    """
    energy = float(columns.error.square().sum())
    if energy <= 0 or target >= 1.0:
        return 0.0
    shift = lean_shift(columns, factor)
    unit = energy / max(1e-30, float((shift * shift * factor.square.unsqueeze(1)).sum()))
    several = stacked(columns, len(LEANS))
    span = max(0.3, 0.7 - target)
    for _ in range(4):
        leans = [unit * span * lean for lean in LEANS]
        shifts = torch.cat([shift * lean for lean in leans], dim=1)
        passed = run_pass(several, factor, shift=shifts, variance=variance, uniform=uniform)
        products = (passed.error * several.error).view(len(factor.order), len(leans), -1).sum((0, 2))
        alignments = (products / energy).tolist()
        if alignments[0] <= target + CLOSE:
            return 0.0
        if alignments[-1] <= target:
            return _crossing(leans, alignments, target)
        span *= 2.0
    return leans[-1]


def _crossing(leans: Sequence[float], alignments: Sequence[float], target: float) -> float:
    """Where a falling curve through some points meets the target: by a parabola through the three points about it."""
    index = next(i for i, alignment in enumerate(alignments) if alignment <= target)
    first = min(max(0, index - 2 if index >= 2 else index - 1), len(leans) - 3)
    x, y = alignments[first : first + 3], leans[first : first + 3]
    low, high = leans[index - 1], leans[index]
    # The parabola is laid through lean as a function of alignment, so that no equation needs solving.
    total = 0.0
    for i in range(3):
        term = y[i]
        for j in range(3):
            if i != j:
                if x[i] == x[j]:
                    return high
                term *= (target - x[j]) / (x[i] - x[j])
        total += term
    straight = low + (high - low) * (alignments[index - 1] - target) / (alignments[index - 1] - alignments[index])
    return total if low <= total <= high else straight
