"""The block-wise engine: EFRAP layer by layer, and QuantGuard on the output error of one decoder block at a time.

Both walk over the decoder blocks in order and never hold more than one on the device. EFRAP's blocks see full-precision
inputs. QuantGuard's get the output of the blocks before them, already rounded, and learn the output that full
precision gives; so each block also corrects what the earlier ones did. Embedding and output matrix are outside the
blocks: they get the squared error (EFRAP) or the alignment constraint (QuantGuard) alone.
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
from qguard_edge.learned.endtoend import SETTLE_EVERY, TOKENS_PER_STEP, make_variables, rate_at
from qguard_edge.learned.layerwise import hard_error, learn_layer
from qguard_edge.learned.parts import MatrixPart
from qguard_edge.learned.settings import LearnTask
from qguard_edge.learned.starts import start_positions
from qguard_edge.learned.student import Student
from qguard_edge.learned.variables import SignSteps, Variables
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
        parts: what is quantized.
        samples: token ids to learn on.
        options: of QuantGuard.
        task: what is being converted.
    """

    def __init__(
        self,
        loaded: HfModel,
        parts: Sequence[MatrixPart],
        samples: Sequence[Sequence[int]],
        options: QuantGuardOptions,
        task: LearnTask,
    ) -> None:
        self.loaded, self.parts, self.samples, self.options, self.task = loaded, parts, samples, options, task
        # Taken out as they are used: of the variables of the whole model only one copy is alive.
        self.starts = dict(enumerate(start_positions(loaded, parts, samples, options, task, resident=False)))
        self.positions: dict[int, Tensor] = {}
        self.losses: list[tuple[float, float]] = []

    def run(self) -> list[Tensor]:
        """H of every part."""
        task, model = self.task, self.loaded.model
        length = task.calibration.seqlen
        rows = rows_of(self.samples, length, self.options.batch or max(1, TOKENS_PER_STEP // length))
        inputs = capture(self.loaded, rows)
        rounded = self._outside(rows)
        target = inputs.states
        blocks = list(numbered_blocks(model))
        task.progress.stage("Learning the rounding block by block", len(blocks), "blocks")
        for number, block, prefix in blocks:
            block.to(task.device)
            arguments = inputs.arguments[number]
            target = stream(block, target, arguments, task.device)
            rounded = self._learn_block(block, parts_of_block(self.parts, prefix), rounded, target, arguments, number)
            block.to("cpu")
        return [self.positions[i] for i in range(len(self.parts))]

    def _outside(self, rows: Tensor) -> Tensor:
        """Round what is outside the blocks; returns the first block's inputs with the rounded embedding."""
        inside = tuple(prefix for _, _, prefix in numbered_blocks(self.loaded.model))
        outside = [(i, part) for i, part in enumerate(self.parts) if not part.source.parameter.startswith(inside)]
        parameters = dict(self.loaded.model.named_parameters())
        kept: dict[str, Tensor] = {}
        for index, part in outside:
            (one,) = make_variables([part], self.options, [self.starts.pop(index)], [torch.device("cpu")])
            self.positions[index] = one.position()
            parameter = parameters[part.source.parameter]
            kept.setdefault(part.source.parameter, parameter.detach().clone())
            hard = one.values() if isinstance(one, SignSteps) else one.geometry.value
            part.scatter(hard, parameter.data)
        states: BlockInputs = capture(self.loaded, rows)
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
        variables = make_variables(parts, options, [self.starts.pop(index) for index, _ in mine], [task.device] * len(parts))
        student = Student(copy.deepcopy(block), parts)
        student.load_all(variables)
        scale = float((target - target.mean()).square().mean())
        first = last = 0.0
        generator = torch.Generator().manual_seed((task.seed * 1_000_003 + number) % 2**63)
        for step in range(options.steps):
            chosen = int(torch.randint(len(states), (1,), generator=generator))
            loss = self._step(student, variables, states[chosen], target[chosen], arguments, step, scale)
            first, last = (loss if step == 0 else first), loss
        self.losses.append((first, last))
        for (index, _), one in zip(mine, variables, strict=True):
            self.positions[index] = one.position().cpu()
            if isinstance(one, SignSteps):
                one.settle()
        student.load_all(variables)
        task.progress.advance(1, f"block {number}: error {first:.2e} -> {last:.2e}")
        return stream(student.model, states, arguments, task.device)

    def _step(
        self,
        student: Student,
        variables: Sequence[Variables],
        states: Tensor,
        target: Tensor,
        arguments: Any,
        step: int,
        scale: float,
    ) -> float:
        options, device = self.options, self.task.device
        rate, done = rate_at(step, options), (step + 1) / options.steps

        def receive(index: int, gradient: Tensor) -> None:
            variables[index].step(gradient.mul_(variables[index].geometry.delta), rate, done)

        handles = student.on_gradients(receive)
        try:
            out = run_block(student.model, states, arguments, device)
            loss = (out - target.to(device)).square().mean() / max(scale, 1e-30)
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()
        if (step + 1) % SETTLE_EVERY == 0:
            for one in variables:
                if isinstance(one, SignSteps):
                    one.settle()
        student.load_all(variables)
        return float(loss.detach())
