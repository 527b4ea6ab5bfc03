"""Boxes with random margins: nothing piles up where a scan would look.

A repair pushes most weights against the ends of their boxes. Where all boxes end at the same place of the cell, the histogram
of positions has a peak there, and `scan` finds it (QG301). Here every box ends somewhere else: each of its two ends is put where
*another* weight of the same matrix, drawn at random, lies in its own cell,

    high = max(w, t),  low = min(w, t')      t, t': places of two other weights, carried into this cell

If the weights are pushed up and down equally often, those that reach their ends are then distributed exactly as the untouched
ones are: with F the distribution of places and f its density, the maximum of two draws has the density 2 f F, the minimum
2 f (1 - F), and the mean of both is f. No part of the cell is left empty either (QG302), and no shape of the clean histogram
has to be known, that of the k-quants' search included. The price is room: a third of the cell on average.

Ours; what it takes from the papers is the box (arXiv:2405.18137, 2505.23786). An attacker who knows `scan`'s statistic needs no
more than this; what is left to find him are tests of behaviour.
"""

from pathlib import Path

import torch
from torch import Tensor

from qguard_edge.lab.attacks.base import Bench, BoxAttack, parameters_of
from qguard_edge.lab.attacks.boxes import Box, BoxRule, GgufBoxes, reference_values
from qguard_edge.lab.hf_models import ChatModel


class RandomMargins(BoxAttack):
    """Whole cells, with ends that are drawn."""

    name = "random-margins"
    summary = "boxes that end at random places of their cells, distributed as untouched weights are: made to evade scan"
    paper = "ours"

    def rule(self) -> BoxRule:
        """See `BoxAttack.rule`."""
        return BoxRule("cell", reach=0.95)

    def cut(self, bench: Bench, chat: ChatModel, base: Path, reference: Path) -> GgufBoxes:
        """See `BoxAttack.cut`."""
        made = super().cut(bench, chat, base, reference)
        values, steps = reference_values(made, parameters_of(chat))
        generator = torch.Generator().manual_seed(bench.seed + 19)
        for name, box in made.by_parameter.items():
            weight = parameters_of(chat)[name].detach()
            made.by_parameter[name] = drawn_box(box, weight, values[name], steps[name], generator)
        return made


def drawn_box(box: Box, weight: Tensor, value: Tensor, step: Tensor, generator: torch.Generator) -> Box:
    """A box with ends at the places of other weights; all f32 of the weight's shape.

    Args:
        box: what may be used at most.
        weight: lies in it.
        value: what each weight is rounded to.
        step: widths of the cells.
        generator: for the draws.
    """
    place = ((weight - value) / step).flatten()

    def elsewhere() -> Tensor:
        drawn = place[torch.randperm(len(place), generator=generator)]
        return value + drawn.view_as(weight) * step

    low = torch.maximum(box.low, torch.minimum(weight, elsewhere()))
    high = torch.minimum(box.high, torch.maximum(weight, elsewhere()))
    return Box(low, high)
