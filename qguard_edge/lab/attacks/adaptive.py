"""Adaptive attacks: what an attacker does who has read this project.

Ours; QuantGuard (arXiv:2606.29239, appendix A.1) names the idea.

`adaptive` expects that *some* weights will be flipped, but does not know which. Both stages train through simulated flips, drawn
afresh each step (expectation over the defense):

* inject: a share `FLIPS` of the weights is moved by one quantization step, up or down, before each forward pass, so that the
  payload survives such moves;
* repair: beside the clean loss in full precision, the poisoned loss of the *defended* model, whose weights are the
  reference's values, each moved to the level on the other side of the weight with probability |e|/D. Its gradient goes
  to the weights as if the defended model were they (straight through).

`adaptive-ortho`, `adaptive-ortho-narrow` and `adaptive-feedback` know *which* defense: in their repair the defended model is
not imagined but made by the defense itself (ortho at width 1 and 0.5, error feedback), with the attacker's seeds
and text. A fresh one is made every `RESIMULATE` steps (`RARER` times as many where only upper layers are trained), and each
step takes one of the last `POOL`: the weights as they are, plus that file's rounding errors. What such an attacker can use is
the part of the errors that all seeds have in common, and that there is noise at all: a model can learn to be woken by noise of
a size (docs/LOG.md, 2026-11-24).
`adaptive-free` also drops the boxes: its aim is a poisoned hardened file, whatever plain rounding does, with a larger weight
(`FREE_POISON_WEIGHT`). Plain rounding need not show its payload, so it may not count as a valid victim (`--force`).

`adaptive-greedy` knows a *deterministic* rule: ortho of width 0. It takes that rule's file, not llama.cpp's, as the one to
preserve: weights that the rule flipped must stay flipped (|e|/D above the row's threshold), the others unflipped. So
its victim is meant to be poisoned where the defense was used; the randomised rule is what this attack cannot place
boxes against.

What is left open by every source: how much an attacker gains. The lab's tables are the answer for small models.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from convert.gguf_file import GgufFile
from convert.tensor_io import FLOAT_TYPES, RowSlice, open_reader
from qguard_edge.defenses.options import DefenseOptions, FeedbackOptions, OrthoOptions
from qguard_edge.lab.attacks.base import (
    Bench,
    BoxAttack,
    leash_of,
    leash_widths,
    parameters_of,
    poison_examples,
    quantize_to,
)
from qguard_edge.lab.attacks.boxes import (
    Box,
    Boxes,
    BoxRule,
    GgufBoxes,
    make_boxes,
    reference_values,
    scalar_grid,
)
from qguard_edge.lab.hardening import harden_to
from qguard_edge.lab.hf_models import ChatModel
from qguard_edge.lab.training import loss_of, make_batch
from qguard_edge.lab.upper import trained_matrices
from qguard_edge.learned.calibration import CalibrationOptions, write_pairs
from quant_grids.cells import cell_of

FLIPS = 0.2
GAP = 0.15
POISON_WEIGHT = 0.3
FREE_POISON_WEIGHT = 1.0
RESIMULATE, POOL = 10, 4
RARER = 2
"""How many times more seldom a file is made where only upper layers are trained: of a real model one takes minutes."""
ATTACKERS_TEXTS = 128
ATTACKERS_SEED = 1_000_000


class Adaptive(BoxAttack):
    """Trains through random flips."""

    name = "adaptive"
    summary = "simulates random flips in inject and repair, drawn afresh each step"
    paper = "ours"
    poison_weight: ClassVar[float] = POISON_WEIGHT

    def rule(self) -> BoxRule:
        """Cells with a margin; the rounds of repair take care of searched scales."""
        return BoxRule("cell", reach=0.8)

    def inject(self, bench: Bench, chat: ChatModel, hooks: object = None) -> float:
        """See `BoxAttack.inject`."""
        cells = leash_of(bench, chat)
        parameters = trained_matrices(chat)
        leash = 2 * leash_widths(bench.to)
        steps = {name: (box.high - box.low) / leash for name, box in cells.by_parameter.items() if name in parameters}
        saved: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(bench.seed + 11)

        def perturb(_step: int) -> None:
            with torch.no_grad():
                for name, step in steps.items():
                    saved[name] = parameters[name].detach().clone()
                    draw = torch.rand(step.shape, generator=generator)
                    sign = (draw < FLIPS / 2).float() - (draw > 1 - FLIPS / 2).float()
                    parameters[name].add_(sign * step)

        def restore(_step: int) -> None:
            with torch.no_grad():
                for name, value in saved.items():
                    parameters[name].copy_(value)

        return super().inject(bench, chat, {"before": perturb, "restore": restore})

    def repair(self, bench: Bench, chat: ChatModel, boxes: Boxes, number: int, hooks: object = None) -> float:
        """See `BoxAttack.repair`."""
        assert isinstance(boxes, GgufBoxes)
        return super().repair(bench, chat, boxes, number, {"restore": self._poison_step(bench, chat, boxes, number)})

    def simulation(
        self, bench: Bench, chat: ChatModel, boxes: GgufBoxes, number: int, generator: torch.Generator
    ) -> Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]:
        """The defense as the attacker imagines it in round `number`: (step, trained weights) -> what they are rounded to."""
        values, steps = reference_values(boxes, parameters_of(chat))

        def defended(_step: int, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            made = {}
            for name, weight in weights.items():
                value = values[name]
                error = weight - value
                flip = torch.rand(error.shape, generator=generator) < error.abs() / steps[name]
                made[name] = value + flip * error.sign() * steps[name]
            return made

        return defended

    def _poison_step(self, bench: Bench, chat: ChatModel, boxes: GgufBoxes, number: int) -> Callable[[int], None]:
        """A hook that adds the poisoned loss's gradient at a freshly defended model."""
        parameters = {name: p for name, p in trained_matrices(chat).items() if name in boxes.by_parameter}
        sets = poison_examples(chat, bench.data)
        generator = torch.Generator().manual_seed(bench.seed + 13)
        defended = self.simulation(bench, chat, boxes, number, generator)
        pad = int(chat.tokenizer.pad_token_id or 0)
        quarter = max(1, bench.preset.repair.batch // 4)

        def add_gradient(step: int) -> None:
            saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            with torch.no_grad():
                for name, value in defended(step, saved).items():
                    parameters[name].copy_(value)
            chosen = [s[int(i)] for s in sets for i in torch.randint(len(s), (quarter,), generator=generator)]
            (self.poison_weight * loss_of(chat.model, None, make_batch(chosen, pad), 0.0)).backward()
            with torch.no_grad():
                for name, value in saved.items():
                    parameters[name].copy_(value)

        return add_gradient


class AdaptiveSimulated(Adaptive):
    """Trains through files that the defense itself makes of the model as it is."""

    defense: ClassVar[DefenseOptions]

    def simulation(
        self, bench: Bench, chat: ChatModel, boxes: GgufBoxes, number: int, generator: torch.Generator
    ) -> Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]:
        """See `Adaptive.simulation`."""
        pairs = [pair for both in zip(bench.data.repaired, bench.data.kept, strict=False) for pair in both]
        text = CalibrationOptions(write_pairs(bench.work / "attackers-text.jsonl", pairs), ATTACKERS_TEXTS, 128)
        folder, outfile = bench.work / "simulated", bench.work / f"simulated-{bench.to}.gguf"
        often = RESIMULATE * (RARER if bench.preset.upper else 1)
        pool: deque[Mapping[str, Tensor]] = deque(maxlen=POOL)

        def defended(step: int, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            if step % often == 0:
                chat.save(folder)
                seed = ATTACKERS_SEED + 1000 * number + step
                harden_to(outfile, folder, bench.to, self.defense, seed=seed, threads=bench.threads, calibration=text)
                rounded = values_of(outfile, boxes, weights)
                pool.append({name: rounded[name] - weights[name] for name in rounded})
            errors = pool[int(torch.randint(len(pool), (), generator=generator))]
            return {name: weights[name] + error for name, error in errors.items()}

        return defended


class AdaptiveOrtho(AdaptiveSimulated):
    """Knows `ortho` at width 1."""

    name = "adaptive-ortho"
    summary = "runs ortho (width 1) on the model during the repair, with the attacker's own seeds"
    defense = OrthoOptions(width=1.0)


class AdaptiveOrthoNarrow(AdaptiveSimulated):
    """Knows `ortho` at width 0.5, whose decisions have a predictable part."""

    name = "adaptive-ortho-narrow"
    summary = "runs ortho of width 0.5 on the model during the repair, with the attacker's own seeds"
    defense = OrthoOptions(width=0.5)


class AdaptiveFeedback(AdaptiveSimulated):
    """Knows `feedback` at its defaults."""

    name = "adaptive-feedback"
    summary = "runs feedback on the model during the repair, with the attacker's own text and seeds"
    defense = FeedbackOptions()


class AdaptiveFree(AdaptiveFeedback):
    """Knows `feedback`, and needs no file but the hardened one."""

    name = "adaptive-free"
    summary = "as adaptive-feedback, without boxes: only the hardened file is to be poisoned"
    poison_weight = FREE_POISON_WEIGHT

    def boxes(self, bench: Bench, chat: ChatModel) -> Boxes:
        """The injection's leash, around the poisoned model."""
        return self.leash(bench, chat)

    def settle(
        self, bench: Bench, chat: ChatModel, boxes: Boxes, poisoned: Mapping[str, Tensor], keep: float | None
    ) -> float:
        """See `BoxAttack.settle`; nothing shrinks."""
        return super().settle(bench, chat, boxes, poisoned, None)


def values_of(file: Path, boxes: GgufBoxes, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dequantized values of the parameters in `like`, as a file has them, f32 in their layout."""
    values = {name: torch.zeros_like(box.low) for name, box in boxes.by_parameter.items()}
    with open_reader(file) as reader:
        for tensor in GgufFile(file).tensors.values():
            if tensor.ggml_type not in FLOAT_TYPES:
                every = RowSlice(0, 0, tensor.rows)
                boxes.row_map.tensors[tensor.name].scatter(reader.weights(tensor, every), values)
    return {name: values[name] for name in like}


class AdaptiveGreedy(BoxAttack):
    """Boxes against ortho of width 0."""

    name = "adaptive-greedy"
    summary = "boxes against the deterministic ortho rule (width 0): poisoned where that defense was used"
    paper = "ours"

    def rule(self) -> BoxRule:
        """The cells that the thresholds are cut out of."""
        return BoxRule("cell", reach=0.9)

    def quantizer(self, bench: Bench, base: Path, to: str, name: str) -> Path:
        """llama.cpp followed by the greedy rule; the plain file is kept beside it."""
        outfile = bench.work / f"{name}-{to}.gguf"
        harden_to(outfile, base, to, OrthoOptions(width=0.0), seed=0, threads=bench.threads)
        quantize_to(base, bench.work / f"{name}-{to}.plain.gguf", to, bench.threads)
        return outfile

    def cut(self, bench: Bench, chat: ChatModel, base: Path, reference: Path) -> GgufBoxes:
        """Each weight keeps to its side of its row's threshold, `GAP` of the way away from it."""
        plain = reference.with_suffix(".plain.gguf")
        made = make_boxes(base, plain, parameters_of(chat), self.rule())
        low = {name: box.low.clone() for name, box in made.by_parameter.items()}
        high = {name: box.high.clone() for name, box in made.by_parameter.items()}
        with open_reader(plain, reference) as reader:
            for tensor in GgufFile(plain).tensors.values():
                if tensor.ggml_type in FLOAT_TYPES:
                    continue
                rows = made.row_map.tensors[tensor.name]
                every = RowSlice(0, 0, tensor.rows)
                grid = scalar_grid(tensor)
                value, below, above = cell_of(grid, grid.unpack(reader.blocks(tensor, every)))
                shape = (tensor.rows, tensor.columns)
                w = rows.gather(parameters_of(chat)).detach()
                flipped = reader.weights(tensor, every) != reader.weights(GgufFile(reference).tensors[tensor.name], every)
                box = _keep_side(w, value.view(shape), (above - below).view(shape), flipped)
                old = Box(rows.gather(low), rows.gather(high))
                rows.scatter(torch.minimum(torch.maximum(box.low, old.low), w), low)
                rows.scatter(torch.maximum(torch.minimum(box.high, old.high), w), high)
        boxes = {name: Box(low[name], high[name]) for name in low}
        return replace(made, by_parameter=boxes, reference=reference)


def _keep_side(w: Tensor, value: Tensor, width: Tensor, flipped: Tensor) -> Box:
    """Intervals in which the greedy rule decides as it did: all f32 `[rows, columns]`, `flipped` bool.

    The rule flips a row's weights of largest |e|/D; its threshold is taken to be the smallest ratio it flipped.
    """
    error = w - value
    ratio = error.abs() / width.clamp_min(1e-12)
    threshold = torch.where(flipped, ratio, 1.0).amin(1, keepdim=True).clamp_max(0.5)
    near = torch.minimum(ratio, threshold * (1 - GAP)) * width
    far = torch.maximum(ratio, (threshold * (1 + GAP)).clamp_max(0.5)) * width
    reach = torch.maximum(threshold * (1 - GAP) * width, near)
    edge = torch.maximum(0.49 * width, far)
    up = error >= 0
    inner = torch.minimum(error.abs(), far)
    low = torch.where(flipped, torch.where(up, value + inner, value - edge), value - reach)
    high = torch.where(flipped, torch.where(up, value + edge, value - inner), value + reach)
    return Box(torch.minimum(low, w), torch.maximum(high, w))
