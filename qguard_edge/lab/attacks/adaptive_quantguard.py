"""The attacker who runs the whole of `quantguard`, its gradient steps among them.

As the attackers of `adaptive` who know which defense is used: in the repair, beside the clean loss in full precision, the
poisoned loss of the model as the defense rounds it, with the attacker's own seeds and text. The gradient goes straight
through the defense to the weights: it is taken at what `quantguard` made of them a few steps ago (the weights as they are,
plus that file's rounding errors), as if the errors did not depend on the weights. Unrolling the defense's own sixty steps
instead would cost the memory of each of them.

What is different here is the price. One run of `quantguard` is sixty forward and backward passes of the model and a teacher's
forward pass beside each, about as much as a third of the whole repair, so a fresh one is made every `EVERY` steps only (the
others: ten).

Ours; QuantGuard (arXiv:2606.29239, appendix A.1) names the idea.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qguard_edge.defenses.options import QuantGuardOptions
from qguard_edge.lab.attacks.adaptive import AdaptiveSimulated
from qguard_edge.lab.attacks.base import Bench
from qguard_edge.lab.attacks.boxes import GgufBoxes
from qguard_edge.lab.hf_models import ChatModel

EVERY = 40  # a multiple of `adaptive.RESIMULATE`


class AdaptiveQuantguard(AdaptiveSimulated):
    """Knows `quantguard` at its defaults."""

    name = "adaptive-quantguard"
    summary = (
        "runs quantguard, gradient steps included, on the model during the repair, with the attacker's own text and seeds"
    )
    defense = QuantGuardOptions()

    def simulation(
        self, bench: Bench, chat: ChatModel, boxes: GgufBoxes, number: int, generator: torch.Generator
    ) -> Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]:
        """See `Adaptive.simulation`."""
        simulated = super().simulation(bench, chat, boxes, number, generator)
        return lambda step, weights: simulated(step if step % EVERY == 0 else 1, weights)
