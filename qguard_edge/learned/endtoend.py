"""End-to-end learned rounding: lower the divergence of the whole quantized model, flip by flip.

Each step: a batch of texts; the teacher's and the student's next-token logits; `L_KL` and its backward pass; every part's
variables move as soon as their gradient is there; then the student gets its new weights. See `qguard_edge.learned.losses`
for the loss, `variables` for the two ways to move, `constraint` for what the plan must hold at every step.

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
from qguard_edge.learned.losses import (
    distance,
    distance_slope,
    kl_divergence,
    reversal,
    reversal_mask,
    reversal_slope,
)
from qguard_edge.learned.parts import MatrixPart
from qguard_edge.learned.settings import LearnTask
from qguard_edge.learned.starts import start_positions
from qguard_edge.learned.student import Student
from qguard_edge.learned.variables import Relaxed, SignSteps, Variables
from qguard_edge.runtimes.devices import autocast
from qguard_edge.runtimes.hf import HfModel

SIGN_RATE, RELAXED_RATE = 0.004, 0.02
BINARIZE = 0.01
TOKENS_PER_STEP = 1024
SAVE_SECONDS = 300.0
SETTLE_EVERY = 5  # steps between two searches for the constraint's thresholds


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
    chosen = [samples[i] for i in order[first : first + size]]
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
    first = options.rate or (SIGN_RATE if options.optimizer == "sign" else RELAXED_RATE)
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
    parts: Sequence[MatrixPart], options: QuantGuardOptions, starts: Sequence[Tensor], devices: Sequence[torch.device]
) -> list[Variables]:
    """Rounding variables of each part at their start, f32 `[rows, columns]` each, on the device of each."""
    weights = sum(part.n_weights for part in parts)
    made: list[Variables] = []
    for part, start, device in zip(parts, starts, devices, strict=True):
        geometry = part.geometry().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        if options.optimizer == "sign":
            made.append(SignSteps(geometry, options.alignment, start.to(device)))
        else:
            made.append(Relaxed(geometry, options.alignment, start.to(device), binarize=BINARIZE, n_weights=weights))
    return made


class EndToEnd:
    """One run.

    Args:
        loaded: the full-precision model; it is moved to the task's device.
        parts: what is quantized.
        samples: token ids to learn on.
        options: of QuantGuard.
        task: what is being converted.
        fingerprint: of the conversion, for the checkpoint.
    """

    def __init__(
        self,
        loaded: HfModel,
        parts: Sequence[MatrixPart],
        samples: Sequence[Sequence[int]],
        options: QuantGuardOptions,
        task: LearnTask,
        fingerprint: str,
    ) -> None:
        self.teacher, self.parts, self.samples = loaded.model, parts, samples
        self.options, self.task, self.fingerprint = options, task, fingerprint
        devices = learning_devices(task.device)
        self.device = devices[0]
        starts = start_positions(loaded, parts, samples, options, task, resident=len(devices) == 1)
        self.student = Student(self.teacher, parts, checkpointing=options.checkpointing, devices=devices)
        place(self.teacher, devices)  # after it was copied: hooks do not survive a copy
        places = [self.student.device_of(index) for index in range(len(parts))]
        self.variables = make_variables(parts, options, starts, places)
        self.masks = [reversal_mask(one.geometry.ratio.float(), options.top) for one in self.variables]
        self.n_masked = max(1, sum(int(mask.sum()) for mask in self.masks))
        self.batch = batch_size(samples, options)
        self.losses: list[tuple[float, float]] = []

    def run(self) -> list[tuple[float, float]]:
        """Learn; returns (loss, KL) of every step."""
        options, progress = self.options, self.task.progress
        first = self._resume()
        progress.stage("Learning the rounding", options.steps, "steps")
        if first:
            progress.note(f"going on after step {first} of {options.steps} from the checkpoint")
            progress.advance(first)
        self.student.load_all(self.variables)
        saved = time.monotonic()
        with stop_requests() as stop:
            for step in range(first, options.steps):
                self.losses.append(self._step(step))
                progress.advance(1, f"loss {self.losses[-1][0]:.4f}, KL {self.losses[-1][1]:.4f}, flips {self.flips():.2%}")
                if stop.wanted:
                    self._save(step + 1)
                    raise KeyboardInterrupt
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save(step + 1)
                    saved = time.monotonic()
        return self.losses

    def flips(self) -> float:
        """Share of the weights that stand at their other level now."""
        taken = sum(int((one.position() >= getattr(one, "threshold", 0.5)).sum()) for one in self.variables)
        return taken / max(1, sum(one.geometry.value.numel() for one in self.variables))

    def _step(self, step: int) -> tuple[float, float]:
        options, device = self.options, self.device
        batch = batch_of(self.samples, self.batch, self.task.seed, step)
        local = self._local_loss()
        rate, progress = rate_at(step, options), (step + 1) / options.steps

        def receive(index: int, gradient: Tensor) -> None:
            one = self.variables[index]
            slope = gradient.mul_(one.geometry.delta).mul_(options.kl)
            self._add_local_slopes(index, slope)
            one.step(slope, rate, progress)

        handles = self.student.on_gradients(receive)
        try:
            with torch.no_grad():
                wanted = logits_of(self.teacher, batch, device)
            loss = kl_divergence(wanted, logits_of(self.student.model, batch, device))
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()
        if (step + 1) % SETTLE_EVERY == 0 or step + 1 == options.steps:
            for one in self.variables:
                if isinstance(one, SignSteps):
                    one.settle()
        self.student.load_all(self.variables)
        divergence = float(loss.detach())
        return options.kl * divergence + local, divergence

    def _add_local_slopes(self, index: int, slope: Tensor) -> None:
        """Add the derivatives of the reversal and distance terms, in place."""
        options, one = self.options, self.variables[index]
        if options.reversal > 0 or options.distance > 0:
            h = one.position()
            if options.reversal > 0:
                factor = options.reversal / self.n_masked
                slope.add_(reversal_slope(h, one.geometry.ratio.float(), self.masks[index]), alpha=factor)
            if options.distance > 0:
                slope.add_(distance_slope(h, one.geometry), alpha=options.distance / len(self.variables))

    def _local_loss(self) -> float:
        """The reversal and distance terms at the present variables."""
        options, total = self.options, 0.0
        for one, mask in zip(self.variables, self.masks, strict=True):
            if options.reversal > 0:
                share = reversal(one.position(), one.geometry.ratio.float(), mask) / self.n_masked
                total += options.reversal * float(share)
            if options.distance > 0:
                total += options.distance * float(distance(one.position(), one.geometry)) / len(self.variables)
        return total

    def _save(self, step: int) -> None:
        path = self.task.checkpoint
        if path is None:
            return
        tensors: dict[str, Tensor] = {}
        for part, one in zip(self.parts, self.variables, strict=True):
            tensors |= {f"{part.name}|{name}": value for name, value in one.state().items()}
        save_checkpoint(path, LearnedState(self.fingerprint, self.task.seed, step, tuple(self.losses), tensors))
        self.task.progress.note(f"step {step} is saved; the same command goes on from there")

    def _resume(self) -> int:
        state = load_checkpoint(self.task.checkpoint, self.fingerprint)
        if state is None:
            return 0
        for part, one in zip(self.parts, self.variables, strict=True):
            start = f"{part.name}|"
            mine = {name.removeprefix(start): t for name, t in state.tensors.items() if name.startswith(start)}
            one.restore({name: tensor.to(one.geometry.value.device) for name, tensor in mine.items()})
        self.losses = list(state.losses)
        return state.step
