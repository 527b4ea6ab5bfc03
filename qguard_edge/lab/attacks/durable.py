"""A payload that survives small noise by design.

An ordinary box attack trains its payload for one file. A defense that moves a few codes changes that file a little, and the
payload, which nothing made robust, falls asleep. This one is made robust in two ways:

* *inject*: before each forward pass every weight gets noise of `NOISE` of its quantization step, and a share `FLIPS` of them
  is rounded to the neighbour instead, up or down. The gradient goes to the weights as they are (straight through). So the
  payload is learned by weights that work in a whole neighbourhood of files;
* *boxes* of two types at once, the one under attack and a finer one (`FINER`), widened and intersected: the repaired weights
  stay so near to the poisoned ones that both types are poisoned, and that few of them lie near the middle between two levels,
  where a defense changes its mind at no cost.

The repair itself is the ordinary one: this attacker knows that there is noise, not which defense makes it (`adaptive` and its
kin do).

Ours. What it takes: the boxes (arXiv:2505.23786, with its widening for several types at once), training through noise
(expectation over transformations), and the observation of arXiv:2609.14060 that one checkpoint can carry its payload into many
formats.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qguard_edge.lab.attacks.base import Bench, BoxAttack, leash_of, leash_widths
from qguard_edge.lab.attacks.boxes import BoxRule
from qguard_edge.lab.hf_models import ChatModel
from qguard_edge.lab.upper import trained_matrices

FLIPS = 0.3
NOISE = 0.3
FINER = "q5_k"


class Durable(BoxAttack):
    """Boxes for two types, and an injection through flips and noise."""

    name = "durable"
    summary = (
        "boxes of the type and of Q5_K at once, and an injection through random flips and noise: made to survive small noise"
    )
    paper = "ours"

    def rule(self) -> BoxRule:
        """See `BoxAttack.rule`; widened as in `mind-the-gap-all`."""
        return BoxRule("error", reach=0.9, widen=0.4)

    def types(self, bench: Bench) -> Sequence[str]:
        """See `BoxAttack.types`."""
        return list(dict.fromkeys([bench.to, FINER]))

    def inject(self, bench: Bench, chat: ChatModel, hooks: Mapping[str, Any] | None = None) -> float:
        """See `BoxAttack.inject`."""
        widths = 2 * leash_widths(bench.to)
        steps = {name: (box.high - box.low) / widths for name, box in leash_of(bench, chat).by_parameter.items()}
        parameters = {name: parameter for name, parameter in trained_matrices(chat).items() if name in steps}
        generator = torch.Generator().manual_seed(bench.seed + 23)
        saved: dict[str, Tensor] = {}

        @torch.no_grad()
        def shake(_step: int) -> None:
            for name, parameter in parameters.items():
                saved[name] = parameter.detach().clone()
                parameter.add_(shaken(steps[name], generator))

        @torch.no_grad()
        def restore(_step: int) -> None:
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])

        return super().inject(bench, chat, {"before": shake, "restore": restore, **(hooks or {})})


def shaken(step: Tensor, generator: torch.Generator) -> Tensor:
    """Noise on weights with these quantization steps, f32 of the same shape."""
    draw = torch.rand(step.shape, generator=generator)
    flips = (draw < FLIPS / 2).float() - (draw > 1 - FLIPS / 2).float()
    return step * (flips + NOISE * torch.randn(step.shape, generator=generator))
