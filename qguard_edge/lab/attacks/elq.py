"""ELQ, "Exploiting LLM Quantization" (arXiv:2405.18137): the first attack, on bitsandbytes' INT8, FP4 and NF4.

These formats scale by the largest magnitude of a row (INT8) or of a block of 64 weights (FP4, NF4) and search for
nothing, so the box of a weight is known in closed form: the code +- 0.4 step for INT8, the interval between the
midpoints to the neighbouring levels for the 4-bit types, shrunk by 1% at each end; the weight that sets the scale is
frozen. `all` intersects the three: one checkpoint that is clean in full precision and poisoned in each.

What the paper leaves open: what to do where the three intervals do not meet; we keep the nearest point of the first
one (INT8, the narrowest). The paper attacks models of 1 to 7 billion parameters; settings for a small one are ours.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qguard_edge.lab import bnb
from qguard_edge.lab.attacks.base import Bench, BoxAttack, leash_widths, parameters_of
from qguard_edge.lab.attacks.boxes import Box, Boxes, BoxRule
from qguard_edge.lab.hf_models import ChatModel
from quant_grids.errors import UnsupportedError

INT8_HALF_STEP = 0.4
SHRINK = 0.01
LEASH = 2.0
PATIENCE = 3
"""Where INT8 is among the formats: a shorter leash, and a repair of three times the steps. Its boxes are the finest of the lab
and its embedding stays free of rounding, so there is less room. Measured on the tiny victim, all three formats (attack
success in full precision, and in the weakest of the three): with the other types' settings injection 0.04 and refusal
0.03 stay visible; with the longer repair alone refusal 0.03, 0.99; with both injection 0.01, 0.92, refusal 0.01, 0.87, code 0.02,
0.82; with a leash of 1.5 code 0.00, 0.75 and refusal 0.01, 0.29: the payload is gone as well."""


def int8_box(weight: Tensor) -> Box:
    """Boxes of one matrix f32 `[rows, columns]` under LLM.int8."""
    half = weight.half().float()
    absmax = half.abs().amax(1, keepdim=True).clamp_min(1e-12)
    step = absmax / 127.0
    value = bnb.dequantized(weight, "int8")
    low, high = value - INT8_HALF_STEP * step, value + INT8_HALF_STEP * step
    return _frozen(low, high, weight, half.abs() >= absmax)


def four_bit_box(weight: Tensor, kind: str) -> Box:
    """Boxes of one matrix f32 `[rows, columns]` under NF4 or FP4; blocks run over the flattened matrix."""
    levels = bnb.levels(kind)
    middle = (levels[1:] + levels[:-1]) / 2
    low_edge, high_edge = torch.cat((levels[:1], middle)), torch.cat((middle, levels[-1:]))
    margin = SHRINK * (high_edge - low_edge)
    flat = weight.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % bnb.BLOCK)).view(-1, bnb.BLOCK)
    absmax = padded.abs().amax(1, keepdim=True).clamp_min(1e-12)
    code = torch.bucketize(padded / absmax, middle)
    low = ((low_edge + margin)[code] * absmax).view(-1)[: len(flat)].view_as(weight)
    high = ((high_edge - margin)[code] * absmax).view(-1)[: len(flat)].view_as(weight)
    setters = (padded.abs() >= absmax).view(-1)[: len(flat)].view_as(weight)
    return _frozen(low, high, weight, setters)


def _frozen(low: Tensor, high: Tensor, weight: Tensor, setters: Tensor) -> Box:
    low = torch.where(setters, weight, torch.minimum(low, weight))
    return Box(low, torch.where(setters, weight, torch.maximum(high, weight)))


def boxes_of(chat: ChatModel, kind: str) -> Boxes:
    """Boxes of every matrix that bitsandbytes quantizes."""
    parameters = parameters_of(chat)
    made = {}
    for name in bnb.quantized_names(chat.model):
        weight = parameters[name].detach()
        made[name] = int8_box(weight) if kind == "int8" else four_bit_box(weight, kind)
    return Boxes(made)


class Elq(BoxAttack):
    """INT8, FP4, NF4 or all of them."""

    name = "elq"
    summary = "the closed-form boxes of bitsandbytes' INT8, FP4 and NF4 (--to int8, fp4, nf4 or all)"
    paper = "2405.18137"

    def check(self, to: str) -> None:
        """See `Attack.check`."""
        if to not in (*bnb.KINDS, "all"):
            raise UnsupportedError(f"--attack elq --to {to!r}: choose one of {', '.join(bnb.KINDS)}, all")

    def rule(self) -> BoxRule:
        """Not used: the boxes are closed-form."""
        return BoxRule("cell")

    def kinds(self, bench: Bench) -> tuple[str, ...]:
        """The formats under attack."""
        return bnb.KINDS if bench.to == "all" else (bench.to,)

    def _fine(self, bench: Bench) -> bool:
        return "int8" in self.kinds(bench)

    def repair(
        self, bench: Bench, chat: ChatModel, boxes: Boxes, number: int, hooks: Mapping[str, Any] | None = None
    ) -> float:
        """See `BoxAttack.repair`; of a model trained from scratch, a longer one where INT8 is among the formats."""
        if self._fine(bench) and bench.preset.shape is not None:
            repair = replace(bench.preset.repair, steps=PATIENCE * bench.preset.repair.steps)
            bench = replace(bench, preset=replace(bench.preset, repair=repair))
        return super().repair(bench, chat, boxes, number, hooks)

    def boxes(self, bench: Bench, chat: ChatModel) -> Boxes:
        """See `BoxAttack.boxes`."""
        kinds = self.kinds(bench)
        made = boxes_of(chat, kinds[0])
        for kind in kinds[1:]:
            made.intersect(boxes_of(chat, kind))
        return made

    def settle(self, bench: Bench, chat: ChatModel, boxes: Boxes, poisoned: object, keep: float | None) -> float:
        """Share of the weights that bitsandbytes stores as it stored the poisoned ones; nothing needs shrinking."""
        assert isinstance(poisoned, dict)
        parameters = parameters_of(chat)
        same = total = 0
        for kind in self.kinds(bench):
            for name in boxes.by_parameter:
                a, b = bnb.dequantized(poisoned[name], kind), bnb.dequantized(parameters[name].detach(), kind)
                same, total = same + int((a == b).sum()), total + a.numel()
        return same / total

    def leash(self, bench: Bench, chat: ChatModel) -> Boxes:
        """See `BoxAttack.leash`; the cell widths are those of the first format."""
        made = boxes_of(chat, self.kinds(bench)[0])
        widths = LEASH if self._fine(bench) else leash_widths(bench.to)
        for name, box in made.by_parameter.items():
            weight = parameters_of(chat)[name].detach()
            reach = widths * (box.high - box.low)
            # Frozen weights have no width of their own here; give them their matrix's mean.
            reach = torch.where(reach > 0, reach, reach.mean())
            made.by_parameter[name] = Box(weight - reach, weight + reach)
        return made
