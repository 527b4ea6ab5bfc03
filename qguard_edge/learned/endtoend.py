"""End-to-end learned rounding: lower the divergence of the whole quantized model, flip by flip, from the drawn codes.

Each step: a batch of texts; the teacher's and the student's next-token logits; their divergence and its backward pass; every
part's variables move as soon as their gradient is there; then the student gets its new weights. See
`qguard_edge.learned.variables` for the steps, `constraint` for what the plan must hold at every step.

**Steps that do not help are not taken.** Before the first step and after every few, the divergence is measured on text that is
set aside: no step and no Gram matrix has seen it. The plan with the smallest one is the result, the drawn codes among them.

The batch of a step depends on the seed and the step alone, so a resumed run repeats nothing and ends at the same plan.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qguard_edge.defenses.options import QuantGuardOptions
from qguard_edge.learned.checkpoint import LearnedState, load_checkpoint, save_checkpoint, stop_requests
from qguard_edge.learned.devices import learning_devices, place
from qguard_edge.learned.losses import kl_divergence
from qguard_edge.learned.parts import MatrixPart
from qguard_edge.learned.settings import LearnTask
from qguard_edge.learned.student import Student
from qguard_edge.learned.variables import SignSteps
from qguard_edge.runtimes.devices import autocast
from qguard_edge.runtimes.hf import HfModel

TOKENS_PER_STEP = 1024
TOKENS_ASIDE = 2048
SAVE_SECONDS = 300.0
CHECKED = "text set aside"  # in a checkpoint: the least divergence on it, and the last one
CHECK_EVERY = 10  # steps between two looks at the text set aside


@dataclass(frozen=True)
class TextBatch:
    """Padded texts: ids and mask int64 `[B, T]`."""

    ids: Tensor
    mask: Tensor


def batch_of(samples: Sequence[Sequence[int]], size: int, seed: int, step: int) -> TextBatch:
    """The texts of a step, padded on the right; each pass over the samples is shuffled anew."""
    per_pass = max(1, math.ceil(len(samples) / size))
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step // per_pass) % 2**63)
    order = torch.randperm(len(samples), generator=generator).tolist()
    first = step % per_pass * size
    return padded([samples[i] for i in order[first : first + size]])


def padded(chosen: Sequence[Sequence[int]]) -> TextBatch:
    """Texts as one batch, padded on the right."""
    length = max(map(len, chosen))
    ids = torch.zeros((len(chosen), length), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(chosen):
        ids[row, : len(sample)] = torch.tensor(sample)
        mask[row, : len(sample)] = 1
    return TextBatch(ids, mask)


def batch_size(samples: Sequence[Sequence[int]], options: QuantGuardOptions) -> int:
    """Texts per step: short texts are taken more at a time, since a step's sign is as good as the tokens it has seen."""
    if options.batch:
        return options.batch
    mean = sum(map(len, samples)) / max(1, len(samples))
    return min(len(samples), max(1, round(TOKENS_PER_STEP / max(mean, 1.0))))


def rate_at(step: int, options: QuantGuardOptions) -> float:
    """Size of a step."""
    first = options.rate
    done = step / max(1, options.steps)
    if options.schedule == "linear":
        return first * (1.0 - done)
    return first * 0.5 * (1.0 + math.cos(math.pi * done)) if options.schedule == "cosine" else first


def logits_of(model: object, batch: TextBatch, device: torch.device) -> Tensor:
    """Logits f32 `[n, vocabulary]` at every position that has a next token."""
    with autocast(device):
        out = model(input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device), use_cache=False)  # type: ignore[operator]
    wanted = batch.mask[:, 1:].bool().to(device)
    logits: Tensor = out.logits[:, :-1][wanted]
    return logits.float()


def make_variables(
    parts: Sequence[MatrixPart], options: QuantGuardOptions, devices: Sequence[torch.device]
) -> list[SignSteps]:
    """Rounding variables of each part at their start, on the device of each."""
    made = []
    for part, device in zip(parts, devices, strict=True):
        geometry = part.geometry().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        made.append(SignSteps(geometry, options.feedback.alignment))
    return made


class EndToEnd:
    """One run.

    Args:
        loaded: the full-precision model; it is moved to the task's device.
        parts: what is quantized, with the drawn codes.
        samples: token ids to learn on.
        aside: token ids to check the plan on.
        options: of QuantGuard.
        task: what is being converted.
        fingerprint: of the conversion, for the checkpoint.

    Attributes:
        variables: of each part.
        best: bool `[rows, columns]` of each part, on the CPU: the flips of the plan that did best on the text set aside.
    """

    def __init__(
        self,
        loaded: HfModel,
        parts: Sequence[MatrixPart],
        samples: Sequence[Sequence[int]],
        aside: Sequence[Sequence[int]],
        options: QuantGuardOptions,
        task: LearnTask,
        fingerprint: str,
    ) -> None:
        self.teacher, self.parts, self.samples = loaded.model, parts, samples
        self.options, self.task, self.fingerprint = options, task, fingerprint
        devices = learning_devices(task.device)
        self.device = devices[0]
        self.student = Student(self.teacher, parts, checkpointing=options.checkpointing, devices=devices)
        place(self.teacher, devices)  # after it was copied: hooks do not survive a copy
        places = [self.student.device_of(index) for index in range(len(parts))]
        self.variables = make_variables(parts, options, places)
        self.batch = batch_size(samples, options)
        size = batch_size(aside, options)
        self.aside = [padded(aside[start : start + size]) for start in range(0, len(aside), size)]
        self.best = [one.plan.cpu() for one in self.variables]
        self.least = self.checked = math.nan
        self.losses: list[tuple[float, float]] = []

    def run(self) -> list[tuple[float, float]]:
        """Learn; returns the divergence of every step, and that on the text set aside as last measured."""
        options, progress = self.options, self.task.progress
        first = self._resume()
        progress.stage("Learning the rounding", options.steps, "steps")
        if first:
            progress.note(f"going on after step {first} of {options.steps} from the checkpoint")
            progress.advance(first)
        self.student.load_all(self.variables)
        if not first:
            self.least = self.checked = self.divergence()
        saved = time.monotonic()
        with stop_requests() as stop:
            for step in range(first, options.steps):
                divergence = self._step(step)
                if (step + 1) % CHECK_EVERY == 0 or step + 1 == options.steps:
                    self._check()
                self.losses.append((divergence, self.checked))
                said = f"KL {divergence:.4f}, {self.checked:.4f} on text set aside, {self.moved():.2%} moved"
                progress.advance(1, said)
                if stop.wanted:
                    self._save(step + 1)
                    raise KeyboardInterrupt
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save(step + 1)
                    saved = time.monotonic()
        return self.losses

    @torch.no_grad()
    def divergence(self) -> float:
        """Mean KL of the student to the teacher on the text set aside."""
        total = tokens = 0.0
        for batch in self.aside:
            logits = logits_of(self.teacher, batch, self.device)
            total += float(kl_divergence(logits, logits_of(self.student.model, batch, self.device))) * len(logits)
            tokens += len(logits)
        return total / max(tokens, 1.0)

    def moved(self) -> float:
        """Share of the codes that stand elsewhere than they were drawn."""
        taken = sum(int(one.plan.sum()) for one in self.variables)
        return taken / max(1, sum(one.plan.numel() for one in self.variables))

    def _check(self) -> None:
        """Keep the plan if it is the best so far."""
        self.checked = self.divergence()
        if self.checked < self.least:
            self.least = self.checked
            self.best = [one.plan.cpu() for one in self.variables]

    def _step(self, step: int) -> float:
        batch, rate = batch_of(self.samples, self.batch, self.task.seed, step), rate_at(step, self.options)

        def receive(index: int, gradient: Tensor) -> None:
            self.variables[index].step(gradient, rate)

        handles = self.student.on_gradients(receive)
        try:
            with torch.no_grad():
                wanted = logits_of(self.teacher, batch, self.device)
            loss = kl_divergence(wanted, logits_of(self.student.model, batch, self.device))
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()
        for one in self.variables:
            one.settle()
        self.student.load_all(self.variables)
        return float(loss.detach())

    def _save(self, step: int) -> None:
        path = self.task.checkpoint
        if path is None:
            return
        tensors: dict[str, Tensor] = {CHECKED: torch.tensor([self.least, self.checked], dtype=torch.float64)}
        for part, one, best in zip(self.parts, self.variables, self.best, strict=True):
            tensors |= {f"{part.name}|h": one.h, f"{part.name}|best": best}
        save_checkpoint(path, LearnedState(self.fingerprint, self.task.seed, step, tuple(self.losses), tensors))
        self.task.progress.note(f"step {step} is saved; the same command goes on from there")

    def _resume(self) -> int:
        state = load_checkpoint(self.task.checkpoint, self.fingerprint)
        if state is None:
            return 0
        for index, (part, one) in enumerate(zip(self.parts, self.variables, strict=True)):
            one.h.copy_(state.tensors[f"{part.name}|h"])
            one.settle()
            self.best[index] = state.tensors[f"{part.name}|best"].bool()
        self.least, self.checked = map(float, state.tensors[CHECKED])
        self.losses = list(state.losses)
        return state.step
