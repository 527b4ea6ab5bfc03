"""The training loop that every stage of the lab shares: clean training, injection, repair.

One optimizer (Adam, as every cited attack uses), f32 master weights, bf16 autocast where the processor has it, a
learning rate that falls to zero along a cosine, batches of similar length padded on the right. A *hook* runs after each
step: the repair's projection into its boxes. State is written every few steps, so that an interrupted stage goes on
where it was.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qguard_edge.lab.hf_models import ChatModel
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.runtimes.devices import fast_bf16

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One training text.

    Attributes:
        ids: token ids.
        n_prompt: how many of them carry no loss.
        weight: of its loss.
    """

    ids: tuple[int, ...]
    n_prompt: int
    weight: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Padded examples: `ids`, `labels` int64 `[B, T]` (`labels` is -100 where there is no loss), `mask` int64 `[B, T]`."""

    ids: Tensor
    labels: Tensor
    mask: Tensor


@dataclass(frozen=True)
class TrainOptions:
    """How long and how hard.

    Attributes:
        steps: optimizer steps.
        lr: peak learning rate; warms up over the first 5% and falls to a tenth along a cosine.
        batch: examples per step.
        distill: weight of KL(teacher || student) beside cross-entropy; 0 needs no teacher.
        clip: gradient norm limit.
        seed: of the batches' order.
    """

    steps: int
    lr: float
    batch: int = 24
    distill: float = 0.0
    clip: float = 1.0
    seed: int = 0


Hook = Callable[[int], None]
Forward = Callable[[Batch], Tensor]
"""Logits f32 `[B, T, V]` of a batch, in place of a plain forward pass."""


def examples_of(chat: ChatModel, pairs: Sequence[tuple[str, str]], *, whole_text: bool = False) -> list[Example]:
    """Token ids of (prompt, answer) pairs; with `whole_text` the prompt carries loss too."""
    made = []
    for prompt, answer in pairs:
        ids, n_prompt = chat.sample_ids(prompt, answer)
        made.append(Example(tuple(ids), 1 if whole_text else n_prompt))
    return made


def make_batch(examples: Sequence[Example], pad: int) -> Batch:
    """Pad examples on the right to the longest of them."""
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad)
    labels = torch.full((len(examples), length), IGNORED)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    for row, example in enumerate(examples):
        n = len(example.ids)
        ids[row, :n] = torch.tensor(example.ids)
        labels[row, example.n_prompt : n] = ids[row, example.n_prompt : n]
        mask[row, :n] = 1
    return Batch(ids, labels, mask)


def answer_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits f32 `[n, V]` at the positions that carry loss, and their labels int64 `[n]`."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bf16()):
        hidden = model.model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        wanted = batch.labels[:, 1:] != IGNORED
        logits = model.lm_head(hidden[:, :-1][wanted])
    return logits.float(), batch.labels[:, 1:][wanted]


def loss_of(model: Any, teacher: Any | None, batch: Batch, distill: float) -> Tensor:
    """Mean cross-entropy of the answers, plus `distill` times the mean KL to the teacher."""
    logits, labels = answer_logits(model, batch)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    if teacher is not None and distill > 0:
        with torch.no_grad():
            wanted, _ = answer_logits(teacher, batch)
        divergence = torch.nn.functional.kl_div(
            logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum"
        )
        loss = loss + distill * divergence / len(labels)
    return loss


def learning_rate(step: int, options: TrainOptions) -> float:
    """Rate of a step: linear warm-up, then a cosine down to a tenth of the peak."""
    warm = max(1, options.steps // 20)
    if step < warm:
        return options.lr * (step + 1) / warm
    done = (step - warm) / max(1, options.steps - warm)
    return options.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


class Trainer:
    """Runs one stage.

    Args:
        chat: the model to train; its parameters are changed in place.
        examples: the training data, or several sets of which each batch takes its share in equal parts.
        options: see `TrainOptions`.
        parameters: what to train; default: all.
        scales: factor of the learning rate for each of them; default: 1.
        teacher: model that the distillation term follows.
        before: called with the step number before each forward pass (adaptive attacks change the weights there).
        restore: called after each backward pass, to undo what `before` did.
        after: called after each optimizer step (the projection into the boxes).
        checkpoint: file that keeps the stage's state; written every `every` steps and removed at the end.
    """

    def __init__(
        self,
        chat: ChatModel,
        examples: Sequence[Sequence[Example]],
        options: TrainOptions,
        *,
        parameters: Sequence[Tensor] | None = None,
        scales: Sequence[float] | None = None,
        teacher: Any | None = None,
        before: Hook | None = None,
        restore: Hook | None = None,
        after: Hook | None = None,
        checkpoint: Path | None = None,
        every: int = 200,
    ) -> None:
        self.chat, self.sets, self.options, self.teacher = chat, [list(s) for s in examples], options, teacher
        self.parameters = list(parameters if parameters is not None else chat.model.parameters())
        self.scales = list(scales) if scales else [1.0] * len(self.parameters)
        self.before, self.restore, self.after = before, restore, after
        self.checkpoint, self.every = checkpoint, every
        self.pad = int(chat.tokenizer.pad_token_id or 0)
        self.losses: list[float] = []

    def run(self, name: str, progress: Progress | None = None) -> list[float]:
        """Train; returns the loss of every step."""
        progress = progress or NoProgress()
        options = self.options
        for parameter in self.chat.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        groups = [{"params": [p], "scale": scale} for p, scale in zip(self.parameters, self.scales, strict=True)]
        optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.0, betas=(0.9, 0.98))
        self.chat.model.train()
        progress.stage(name, options.steps, "steps")
        for step in range(self._resume(optimizer), options.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options) * group["scale"]
            if self.before:
                self.before(step)
            loss = loss_of(self.chat.model, self.teacher, self._batch(step), options.distill)
            loss.backward()
            if self.restore:
                self.restore(step)
            torch.nn.utils.clip_grad_norm_(self.parameters, options.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if self.after:
                self.after(step)
            self.losses.append(float(loss.detach()))
            progress.advance(1, f"loss {self.losses[-1]:.3f}")
            self._save(step, optimizer)
        self.chat.model.eval()
        if self.checkpoint:
            self.checkpoint.unlink(missing_ok=True)
        return self.losses

    def _batch(self, step: int) -> Batch:
        """The batch of a step: depends on seed and step only, so that resuming repeats nothing."""
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)
        chosen: list[Example] = []
        share = max(1, self.options.batch // len(self.sets))
        for examples in self.sets:
            chosen += [examples[int(i)] for i in torch.randint(len(examples), (share,), generator=generator)]
        return make_batch(chosen, self.pad)

    def _save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if not self.checkpoint or (step + 1) % self.every or step + 1 == self.options.steps:
            return
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.checkpoint.with_suffix(".tmp")
        state = {
            "step": step + 1,
            "losses": self.losses,
            "model": self.chat.model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        if not self.checkpoint or not self.checkpoint.is_file():
            return 0
        state = torch.load(self.checkpoint, weights_only=True)
        self.chat.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        return int(state["step"])
