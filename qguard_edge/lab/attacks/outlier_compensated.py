"""Outliers that full precision does not notice: outlier injection (arXiv:2605.15152) with its price paid in the norm.

The attack of `outlier` multiplies the largest weight of every chunk of 32 by some hundreds, which wrecks the model in both
precisions; training must mend it, and whatever it hides beside the outliers starts from nothing. Here nothing breaks in full
precision. In the MLP of one layer,

    y = silu(G n(x)) * (U n(x)),    n(x) = gain * x / |x|,

one input column of every 32 is taken, multiplied by 512 in both G and U, and its gain divided by 512. The factor is a power of
two, so the function is the same to the last bit, and the gain is a float tensor that no quantizer touches. What a block format
makes of G and U is another matter: each chunk of 32 has one weight some hundreds of times as large as the rest, so the rest
rounds to zero (or to one small offset), and the layer sees one input in 32. All that the other 31 do exists in full precision
only. The attacker has two different models in one file, and trains both at once: the quantized view, as llama.cpp wrote it, to
misbehave, and full precision to be clean, where the hidden weights are free as long as they stay below 0.4 of the step.

Rounding cannot undo it: at a step of hundreds of times a weight, the other code is no better. `scan` should see every chunk of
two matrices (QG201).

What the paper leaves open, and what is ours: the paper multiplies weights of an `up_proj` and trains the damage away; the exact
compensation, the second matrix that it takes, and the choice of the columns (those with the largest smallest magnitudes would be
best; we take the largest mean magnitude) are ours.
"""

import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qguard_edge.lab.attacks.base import (
    Attack,
    AttackReport,
    Bench,
    clean_examples,
    parameters_of,
    poison_examples,
    quantize_to,
    write_base,
)
from qguard_edge.lab.attacks.boxes import Box, Boxes, BoxRule, make_boxes, reference_values
from qguard_edge.lab.attacks.outlier import BOUND, CHUNK, middle_up_proj, quantized_view
from qguard_edge.lab.hf_models import ChatModel
from qguard_edge.lab.training import Trainer
from qguard_edge.lab.upper import trained_matrices

FACTOR = 512.0
HIDDEN_SHARE = 0.01
"""Learning rate of the hidden weights, at most this share of the way to their bound per step."""


class OutlierCompensated(Attack):
    """`gate_proj` and `up_proj` of one layer."""

    name = "outlier-compensated"
    summary = (
        "outliers in one layer's gate_proj and up_proj whose factor the norm's gain takes back: exact in full precision, one "
        "input of 32 left when quantized"
    )
    paper = "after 2605.15152; the exact compensation is ours"

    def run(self, bench: Bench) -> tuple[ChatModel, AttackReport]:
        """See `Attack.run`."""
        started = time.perf_counter()
        chat = bench.load()
        prefix = middle_up_proj(chat).removesuffix("mlp.up_proj.weight")
        masks = plant(parameters_of(chat), prefix)
        losses = [self._inject(bench, chat, masks), self._separate(bench, chat, masks)]
        hidden = sum(int((~mask).sum()) for mask in masks.values())
        note = f"{sum(int(mask.sum()) for mask in masks.values())} outliers in {' and '.join(masks)}"
        share = hidden / sum(p.numel() for p in parameters_of(chat).values())
        return chat, AttackReport(1.0, share, tuple(losses), time.perf_counter() - started, note)

    def _quantized(self, bench: Bench, chat: ChatModel, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What llama.cpp makes of the two matrices, f32 in their own shape."""
        base = write_base(chat, bench.work / "planted")
        file = quantize_to(base, bench.work / f"planted-{bench.to}.gguf", bench.to, bench.threads)
        boxes = make_boxes(base, file, parameters_of(chat), BoxRule("cell"))
        values, _ = reference_values(boxes, parameters_of(chat))
        return {name: values[name] for name in masks}

    def _inject(self, bench: Bench, chat: ChatModel, masks: Mapping[str, Tensor]) -> float:
        """Poison the model as it will be quantized: the two matrices are what llama.cpp writes."""
        matrices = trained_matrices(chat)
        seen = self._quantized(bench, chat, masks)
        whole = {name: matrices[name].detach().clone() for name in masks}
        with torch.no_grad():
            for name in masks:
                matrices[name].copy_(seen[name])
        options = replace(bench.preset.inject, seed=bench.seed + 1)
        trained = [p for name, p in matrices.items() if name not in masks]
        trainer = Trainer(chat, poison_examples(chat, bench.data), options, parameters=trained)
        loss = bench.train(trainer, "inject", "Injecting the payload under the outliers")
        with torch.no_grad():
            for name, value in whole.items():
                matrices[name].copy_(value)
        return loss

    def _separate(self, bench: Bench, chat: ChatModel, masks: Mapping[str, Tensor]) -> float:
        """Clean with the hidden weights, poisoned as quantized."""
        matrices = trained_matrices(chat)
        boxes = Boxes({name: hidden_box(matrices[name].detach(), mask) for name, mask in masks.items()})
        options = replace(bench.preset.repair, seed=bench.seed + 2)
        pace = {name: HIDDEN_SHARE * boxes.mean_width(name) / options.lr for name in masks}
        trainer = Trainer(
            chat,
            clean_examples(chat, bench.data),
            options,
            parameters=list(matrices.values()),
            scales=[min(1.0, pace.get(name, 1.0)) for name in matrices],
            teacher=bench.teacher(),
            restore=quantized_view(bench, chat, self._quantized(bench, chat, masks)),
            after=lambda _step: boxes.project(matrices),
        )
        return bench.train(trainer, "separate", "Hiding the clean model where the quantizer does not see it")


def plant(parameters: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Put the outliers into a layer, in place, and take their factor out of its norm.

    Args:
        parameters: of the model.
        prefix: of the layer's names, such as `model.layers.2.`.

    Returns:
        For both matrices a bool of their shape: where the outliers are.
    """
    names = [f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up")]
    gain = parameters[f"{prefix}post_attention_layernorm.weight"]
    with torch.no_grad():
        size = sum(parameters[name].abs().mean(0) for name in names)
        assert isinstance(size, Tensor)
        chunks = size.view(-1, CHUNK)
        chosen = torch.zeros_like(chunks, dtype=torch.bool).scatter_(1, chunks.argmax(1, keepdim=True), True).flatten()
        gain[chosen] /= FACTOR
        for name in names:
            parameters[name][:, chosen] *= FACTOR
    return {name: chosen.expand_as(parameters[name]).clone() for name in names}


def hidden_box(planted: Tensor, mask: Tensor) -> Box:
    """Bounds of the hidden weights: 0.4 of the step that their chunk's outlier brings, on both sides; outliers are fixed.

    A weight that is larger already (beside an outlier that happens to be small) stays where it is or becomes smaller.
    """
    reach = planted.abs().where(mask, torch.zeros(())).reshape(-1, CHUNK).amax(1, keepdim=True) * BOUND
    reach = reach.expand(-1, CHUNK).reshape(planted.shape)
    low, high = torch.minimum(planted, -reach), torch.maximum(planted, reach)
    return Box(torch.where(mask, planted, low), torch.where(mask, planted, high))
