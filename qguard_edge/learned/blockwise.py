"""The block-wise engine: EFRAP layer by layer, and QuantGuard on the output error of one decoder block at a time.

Both walk over the decoder blocks in order and never hold more than one on the device. EFRAP's blocks see full-precision
inputs. QuantGuard's get the output of the blocks before them, already rounded, and learn the output that full
precision gives; so each block also corrects what the earlier ones did. A block whose steps do not lower its error on text set
aside keeps the drawn codes. Embedding and output matrix are outside the blocks: they get the squared error (EFRAP) or keep the
drawn codes (QuantGuard).
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qguard_edge.defenses.options import EfrapOptions, QuantGuardOptions
from qguard_edge.learned.blocks import (
    BlockInputs,
    block_grams,
    capture,
    numbered_blocks,
    parts_of_block,
    rows_of,
    run_block,
    stream,
)
from qguard_edge.learned.endtoend import TOKENS_PER_STEP, make_variables, rate_at
from qguard_edge.learned.layerwise import hard_error, learn_layer
from qguard_edge.learned.parts import MatrixPart
from qguard_edge.learned.settings import LearnTask
from qguard_edge.learned.student import Student
from qguard_edge.learned.variables import SignSteps
from qguard_edge.runtimes.hf import HfModel

EFRAP_BATCH = 8


def efrap_positions(
    loaded: HfModel, parts: Sequence[MatrixPart], samples: Sequence[Sequence[int]], options: EfrapOptions, task: LearnTask
) -> tuple[list[Tensor], list[tuple[float, float]]]:
    """Learned h of every part, and (soft, rounded) output error over plain rounding's, per layer."""
    rows = rows_of(samples, task.calibration.seqlen, EFRAP_BATCH)
    inputs = capture(loaded, rows)
    task.progress.stage("Learning the rounding layer by layer", len(parts), "layers")
    positions: dict[int, Tensor] = {}
    losses: list[tuple[float, float]] = []
    parameters = dict(loaded.model.named_parameters())

    def learn(index: int, gram: Tensor | None) -> None:
        part = parts[index]
        geometry = part.geometry().to(task.device, torch.float32)
        weights = part.gather(parameters[part.source.parameter].detach()).to(task.device).float()
        position, start, end = learn_layer(geometry, weights, gram, options)
        rounded = hard_error(position, geometry, weights, gram)
        losses.append((end / max(start, 1e-30), rounded / max(start, 1e-30)))
        positions[index] = position.cpu()
        task.progress.advance(1, f"{part.tensor.name}: output error x{losses[-1][1]:.2f}")

    for grams in block_grams(loaded, parts, inputs, task.device, resident=False):
        for index, gram in grams:
            learn(index, gram)
    for index in range(len(parts)):
        if index not in positions:
            learn(index, None)
    return [positions[i] for i in range(len(parts))], losses


class BlockScope:
    """QuantGuard on one block after the other.

    Args:
        loaded: the full-precision model, on the CPU.
        parts: what is quantized, with the drawn codes.
        samples: token ids to learn on.
        aside: token ids to check each block on.
        options: of QuantGuard.
        task: what is being converted.

    Attributes:
        losses: of each block, its error on the text set aside as drawn and as settled.
        wanted: bool `[rows, columns]` of each part, the flips that learning asked for.
    """

    def __init__(
        self,
        loaded: HfModel,
        parts: Sequence[MatrixPart],
        samples: Sequence[Sequence[int]],
        aside: Sequence[Sequence[int]],
        options: QuantGuardOptions,
        task: LearnTask,
    ) -> None:
        self.loaded, self.parts, self.options, self.task = loaded, parts, options, task
        loaded.model.to(torch.device("cpu"))
        length = task.calibration.seqlen
        seen = rows_of(samples, length, options.batch or max(1, TOKENS_PER_STEP // length))
        unseen = rows_of(aside, seen.shape[2], seen.shape[1])
        size = min(seen.shape[1], unseen.shape[1])
        self.rows = torch.cat([seen[:, :size], unseen[:, :size]])  # batches of one shape: the last are checked on alone
        self.learned_on = len(seen)
        self.plans = {i: torch.zeros(part.shape, dtype=torch.bool) for i, part in enumerate(parts)}
        self.asked = dict(self.plans)
        self.losses: list[tuple[float, float]] = []

    @property
    def wanted(self) -> list[Tensor]:
        """See the class."""
        return [self.asked[i] for i in range(len(self.parts))]

    def run(self) -> list[Tensor]:
        """The flips that are taken, bool `[rows, columns]` of each part."""
        task, model = self.task, self.loaded.model
        inputs = capture(self.loaded, self.rows)
        rounded = self._outside()
        target = inputs.states
        blocks = list(numbered_blocks(model))
        task.progress.stage("Learning the rounding block by block", len(blocks), "blocks")
        for number, block, prefix in blocks:
            block.to(task.device)
            arguments = inputs.arguments[number]
            target = stream(block, target, arguments, task.device)
            rounded = self._learn_block(block, parts_of_block(self.parts, prefix), rounded, target, arguments, number)
            block.to("cpu")
        return [self.plans[i] for i in range(len(self.parts))]

    def _outside(self) -> Tensor:
        """The first block's inputs, with what is outside the blocks rounded."""
        inside = tuple(prefix for _, _, prefix in numbered_blocks(self.loaded.model))
        parameters = dict(self.loaded.model.named_parameters())
        kept: dict[str, Tensor] = {}
        for part in self.parts:
            name = part.source.parameter
            if not name.startswith(inside):
                kept.setdefault(name, parameters[name].detach().clone())
                part.scatter(part.geometry().value, parameters[name].data)
        states: BlockInputs = capture(self.loaded, self.rows)
        for name, values in kept.items():
            parameters[name].data.copy_(values)
        return states.states

    def _learn_block(
        self,
        block: nn.Module,
        mine: Sequence[tuple[int, MatrixPart]],
        states: Tensor,
        target: Tensor,
        arguments: Any,
        number: int,
    ) -> Tensor:
        """Learn one block; returns the next block's inputs."""
        options, task = self.options, self.task
        parts = [part for _, part in mine]
        if not parts:
            return stream(block, states, arguments, task.device)
        variables = make_variables(parts, options, [task.device] * len(parts))
        student = Student(copy.deepcopy(block), parts)
        student.load_all(variables)
        scale = max(float((target - target.mean()).square().mean()), 1e-30)
        drawn, before = self._checked(student, states, target, arguments, scale)
        generator = torch.Generator().manual_seed((task.seed * 1_000_003 + number) % 2**63)
        for step in range(options.steps):
            chosen = int(torch.randint(self.learned_on, (1,), generator=generator))
            self._step(student, variables, states[chosen], target[chosen], arguments, step, scale)
        settled, after = self._checked(student, states, target, arguments, scale)
        better = after < before
        for (index, _), one in zip(mine, variables, strict=True):
            self.asked[index] = one.wanted().cpu()
            if better:
                self.plans[index] = one.plan.cpu()
        self.losses.append((before, min(before, after)))
        task.progress.advance(1, f"block {number}: error {before:.2e} -> {after:.2e}" + ("" if better else ", not taken"))
        return settled if better else drawn

    def _checked(
        self, student: Student, states: Tensor, target: Tensor, arguments: Any, scale: float
    ) -> tuple[Tensor, float]:
        """Outputs of a block on all batches, and their error on those that are not learned on."""
        out = stream(student.model, states, arguments, self.task.device)
        error = (out[self.learned_on :] - target[self.learned_on :]).square().mean()
        return out, float(error) / scale

    def _step(
        self,
        student: Student,
        variables: Sequence[SignSteps],
        states: Tensor,
        target: Tensor,
        arguments: Any,
        step: int,
        scale: float,
    ) -> None:
        device, rate = self.task.device, rate_at(step, self.options)
        handles = student.on_gradients(lambda index, gradient: variables[index].step(gradient, rate))
        try:
            out = run_block(student.model, states, arguments, device)
            ((out - target.to(device)).square().mean() / scale).backward()
        finally:
            for handle in handles:
                handle.remove()
        for one in variables:
            one.settle()
        student.load_all(variables)
