"""Drawn codes that gradient steps moved, and what of the draws' entropy can still be vouched for.

The steps are a rule that anybody can run: given the draws D, the text and the seed of the batches, the moves M follow. The
file F is D with M made. How much of the entropy of D is in F? Whoever knows F and M knows D, so

    H(F) >= H(D) - H(D | F) >= H(D) - H(M)

and M is which m of a matrix's n codes were moved, each from one of two sides (a move goes to the level across the weight, so
from F it came from above or from below):

    H(M) <= log2 C(n, m) + m + log2(n + 1)         the last term is for m itself

That bound is what reports say. It is a floor, not an estimate: moves that follow from the draws by a rule take less.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qguard_edge.defenses.base import JoinedKey, MatrixRule, Rounded, SliceKey
from qguard_edge.learned.matrices import Drawn
from qguard_edge.learned.parts import rounding_error
from quant_grids import Grid, Outcome
from quant_grids.base import ScalarGrid


def bits_of_moves(moved: int, codes: int) -> float:
    """The most bits that it takes to say which of some codes were moved, and from where."""
    nats = math.lgamma(codes + 1) - math.lgamma(moved + 1) - math.lgamma(codes - moved + 1)
    return nats / math.log(2.0) + moved + math.log2(codes + 1)


@dataclass(frozen=True)
class MovedCodes:
    """A matrix with its final codes.

    Attributes:
        drawn: as error feedback drew it.
        blocks: uint8 `[n_blocks, type_size]`, on the CPU.
        moved: codes that differ.
        codes: of the matrix.
    """

    drawn: Drawn
    blocks: Tensor
    moved: int
    codes: int

    @cached_property
    def bits(self) -> float:
        """Entropy of the draws that can be vouched for."""
        return max(0.0, self.drawn.bits - bits_of_moves(self.moved, self.codes))


@dataclass(frozen=True)
class MovedRule(MatrixRule):
    """Hands out what was settled while learning.

    Attributes:
        grid: of the matrix.
        matrix: its codes.
    """

    grid: Grid
    matrix: MovedCodes

    def round(self, blocks: Tensor, weights: Tensor, key: SliceKey | JoinedKey) -> Rounded:
        """See `MatrixRule.round`."""
        assert isinstance(self.grid, ScalarGrid)
        first = key.row * (len(blocks) // len(weights))
        made = self.matrix.blocks[first : first + len(blocks)].to(blocks.device)
        old, new = (rounding_error(self.grid, codes, weights).view(-1) for codes in (blocks, made))
        changed, _ = self.grid.changed_codes(blocks, made)
        outcome = Outcome(changed, *(float(torch.dot(a, b)) for a, b in ((old, old), (old, new), (new, new))))
        return Rounded(made, outcome, self.matrix.bits * len(blocks) / len(self.matrix.blocks))
