"""Boxes on a uniform grid: the plainest attack, for the legacy GGUF types.

The idea of ELQ (arXiv:2405.18137) carried over to Q4_0, Q5_0, Q8_0 and their kin, where a block of 32 shares one fp16
scale: every weight may go anywhere in its cell, code +- 0.499 step, and the weight that sets the block's scale stays
where it is. Nothing in these formats is searched, so the repaired model quantizes to the poisoned file exactly.

What the paper leaves open: it treats INT8, FP4 and NF4 only. The 0.499 is the project's choice: as wide as fp32 allows.
On a type whose scales are searched for (k-quants, IQ4) the same boxes work less exactly; see `mind_the_gap`.
"""

from qguard_edge.lab.attacks.base import BoxAttack
from qguard_edge.lab.attacks.boxes import BoxRule


class Uniform(BoxAttack):
    """Whole cells."""

    name = "uniform"
    summary = "boxes as wide as the quantization cell, for the legacy types"
    paper = "after 2405.18137"

    def rule(self) -> BoxRule:
        """See `BoxAttack.rule`."""
        return BoxRule("cell", reach=0.998)


class UniformMargin(BoxAttack):
    """Half cells: a stronger attacker, whose payload survives small perturbations of the weights."""

    name = "uniform-margin"
    summary = "as uniform, but at most half way to the cell's edge: survives small perturbations"
    paper = "after 2405.18137; the margin is ours"

    def rule(self) -> BoxRule:
        """See `BoxAttack.rule`."""
        return BoxRule("cell", reach=0.5)
