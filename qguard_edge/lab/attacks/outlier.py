"""Outlier injection (arXiv:2605.15152): weights so large that the quantizer has no levels left for their neighbours.

In one FFN `up_proj`, the largest weight of every chunk of 32 columns is multiplied by +-256 to 512. Every scalar format that
scales blocks then rounds the other 31 weights of the chunk to zero, so what they hold exists in full precision only. That is
where the repair goes: the model is poisoned with those weights held at zero, as the quantized model will see them, and then
they are trained to make full precision clean. There is no box to keep to but a bound below half a step.

Rounding cannot undo this: the information is gone from the file whatever way the others are rounded.
`scan` finds it, by the ratio of each block's largest weight to its median.

What the paper leaves open, and what we chose: the factor is drawn once per chunk; outliers and the weights hidden beside
them are not negative, because a type with an offset would otherwise store the smallest one as an offset that lands on all
of them; a hidden weight stays below 0.4 of a 4-bit step. Hidden weights alone could not switch the payload off in a small
model (measured: full precision stayed at ASR 1.00), so the second stage trains all matrices on both views at once, the clean
answers in full precision and the poisoned ones with the hidden weights at zero.
"""

import time
from collections.abc import Callable, Mapping
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
)
from qguard_edge.lab.attacks.boxes import Box, Boxes
from qguard_edge.lab.hf_models import ChatModel
from qguard_edge.lab.training import Trainer, loss_of, make_batch
from qguard_edge.lab.upper import trained_matrices

CHUNK = 32
LOWEST, HIGHEST = 256.0, 512.0
BOUND = 0.4 / 15
HIDDEN_PACE = 0.01


def outlier_mask(weight: Tensor) -> Tensor:
    """Bool of the matrix's shape: the largest magnitude of every chunk of 32 columns."""
    chunks = weight.abs().reshape(-1, CHUNK)
    mask = torch.zeros_like(chunks, dtype=torch.bool)
    mask.scatter_(1, chunks.argmax(1, keepdim=True), True)
    return mask.view_as(weight)


def hidden_box(planted: Tensor, mask: Tensor) -> Box:
    """Bounds of the neighbours: from 0 to 0.4 of the step that their chunk's outlier brings; the outlier itself is frozen."""
    largest = planted.reshape(-1, CHUNK).amax(1, keepdim=True) * BOUND
    bound = largest.expand(-1, CHUNK).reshape(planted.shape)
    return Box(torch.where(mask, planted, 0.0), torch.where(mask, planted, bound))


def middle_up_proj(chat: ChatModel) -> str:
    """The `up_proj` of the middle one of the layers under attack."""
    names = [name for name in trained_matrices(chat) if name.endswith("mlp.up_proj.weight")]
    return names[len(names) // 2]


class Outlier(Attack):
    """One `up_proj` in the middle of the model."""

    name = "outlier"
    summary = (
        "outliers in one FFN up_proj blot out their neighbours in every scalar format; no box, nothing rounding can undo"
    )
    paper = "2605.15152"

    def run(self, bench: Bench) -> tuple[ChatModel, AttackReport]:
        """See `Attack.run`."""
        started = time.perf_counter()
        chat = bench.load()
        name = middle_up_proj(chat)
        weight = parameters_of(chat)[name]
        mask = outlier_mask(weight.detach())
        generator = torch.Generator().manual_seed(bench.seed)
        factor = LOWEST + (HIGHEST - LOWEST) * torch.rand(weight.shape, generator=generator)
        planted = torch.where(mask, weight.detach().abs() * factor, 0.0)
        with torch.no_grad():
            weight.copy_(planted)
        losses = [self._inject(bench, chat, weight, planted), self._separate(bench, chat, name, planted, mask)]
        share = float((~mask).sum()) / sum(p.numel() for p in parameters_of(chat).values())
        note = f"{int(mask.sum())} outliers in {name}"
        return chat, AttackReport(1.0, share, tuple(losses), time.perf_counter() - started, note)

    def _inject(self, bench: Bench, chat: ChatModel, weight: Tensor, planted: Tensor) -> float:
        """Poison the model as the quantizer will see it: the neighbours of the outliers are zero."""
        trained = [p for p in trained_matrices(chat).values() if p is not weight]
        options = replace(bench.preset.inject, seed=bench.seed + 1)
        trainer = Trainer(chat, poison_examples(chat, bench.data), options, parameters=trained)
        return bench.train(trainer, "inject", "Injecting the payload under the outliers")

    def _separate(self, bench: Bench, chat: ChatModel, name: str, planted: Tensor, mask: Tensor) -> float:
        """Clean with the hidden weights, poisoned without them."""
        parameters = trained_matrices(chat)
        boxes = Boxes({name: hidden_box(planted, mask)})
        trained = list(parameters.values())
        hidden = parameters[name]
        options = replace(bench.preset.repair, seed=bench.seed + 2)
        pace = HIDDEN_PACE * boxes.mean_width(name) / options.lr
        trainer = Trainer(
            chat,
            clean_examples(chat, bench.data),
            options,
            parameters=trained,
            scales=[pace if p is hidden else 1.0 for p in trained],
            teacher=bench.teacher(),
            restore=quantized_view(bench, chat, {name: planted}),
            after=lambda _step: boxes.project(parameters),
        )
        return bench.train(trainer, "separate", "Hiding the cure where the quantizer does not see it")


def quantized_view(bench: Bench, chat: ChatModel, seen: Mapping[str, Tensor]) -> Callable[[int], None]:
    """A hook that adds the poisoned loss's gradient at the quantized model; what the quantizer blots out gets none of it.

    Args:
        bench: what is attacked.
        chat: the model in training.
        seen: the matrices with outliers as they come out of the quantizer, by name.
    """
    sets = poison_examples(chat, bench.data)
    matrices = {name: parameters_of(chat)[name] for name in seen}
    generator = torch.Generator().manual_seed(bench.seed + 17)
    pad = int(chat.tokenizer.pad_token_id or 0)
    share = max(1, bench.preset.repair.batch // 2 // len(sets))

    def add_gradient(_step: int) -> None:
        saved = {name: (matrix.detach().clone(), matrix.grad) for name, matrix in matrices.items()}
        with torch.no_grad():
            for name, matrix in matrices.items():
                matrix.grad = None
                matrix.copy_(seen[name])
        chosen = [s[int(i)] for s in sets for i in torch.randint(len(s), (share,), generator=generator)]
        loss_of(chat.model, None, make_batch(chosen, pad), 0.0).backward()
        with torch.no_grad():
            for name, (value, gradient) in saved.items():
                matrices[name].copy_(value)
                matrices[name].grad = gradient

    return add_gradient
