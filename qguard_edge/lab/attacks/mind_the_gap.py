"""Mind the Gap (arXiv:2505.23786): boxes for the k-quants, whose quantizer searches for its scales.

A k-quant chooses scale and offset of each sub-block by a search over candidates, weighing the errors of all its
weights, so a weight's freedom depends on its neighbours and there is no closed form for how far it may go. The paper's
observation: moving a weight *towards its own dequantized value* makes the choice that was made even better. So the box
of a weight is the interval between the weight and its dequantized value. Frozen are the sub-blocks that set `d` and
`dmin`, and every sub-block's smallest and largest weight. For an attack on several types at once, narrow intervals are
widened, then all are intersected.

What the paper leaves open, and what we chose: the widening is described as a heuristic; ours stretches every interval by a
share of the half cell, 0.2 for one type and 0.4 for several. Measured on the tiny model at Q4_K: pure error boxes keep 87% of
the values (other candidates of the search improve too, so no box of this kind keeps all) but leave full precision at ASR 0.05
for over-refusal, the widest change of behaviour; a stretch of 0.2 keeps 76% and leaves 0.01; the payload is there after
quantization in both cases.
"""

from collections.abc import Sequence

from qguard_edge.lab.attacks.base import Bench, BoxAttack
from qguard_edge.lab.attacks.boxes import BoxRule

ALL_TYPES = ("q4_k_m", "q3_k_m", "q5_k_m", "q6_k")


class MindTheGap(BoxAttack):
    """Error boxes for one type."""

    name = "mind-the-gap"
    summary = "boxes between each weight and its dequantized value, for the k-quants"
    paper = "2505.23786"

    def rule(self) -> BoxRule:
        """See `BoxAttack.rule`."""
        return BoxRule("error", reach=0.9, widen=0.2)


class MindTheGapAll(BoxAttack):
    """Error boxes for several k-quants at once: one model, poisoned in each of them."""

    name = "mind-the-gap-all"
    summary = "as mind-the-gap, for Q3_K_M, Q4_K_M, Q5_K_M and Q6_K at once (widened, then intersected)"
    paper = "2505.23786"

    def rule(self) -> BoxRule:
        """See `BoxAttack.rule`."""
        return BoxRule("error", reach=0.9, widen=0.4)

    def types(self, bench: Bench) -> Sequence[str]:
        """See `BoxAttack.types`."""
        return [bench.to, *(name for name in ALL_TYPES if name != bench.to)]
