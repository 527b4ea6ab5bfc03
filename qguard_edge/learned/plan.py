"""From variables learned from plain codes (`efrap`) to what `Defense.choose` answers: packed bits per tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qguard_edge.defenses.base import SliceKey
from qguard_edge.learned.constraint import alignment_of, complete
from qguard_edge.learned.parts import FlipGeometry, Matrix, MatrixPart
from qguard_edge.learned.settings import LearnTask

Bits = npt.NDArray[np.uint8]
SHIFT_WIDTH = 0.5  # of the random shift of tensors that are not learned


@dataclass
class LearnedPlan:
    """Which flips to take.

    Attributes:
        bits: per tensor, uint8 `[rows, ceil(columns / 8)]`, one bit per weight.
        columns: per tensor.
        energy: squared error of plain rounding, over all tensors.
        learned: `<t', t>` with the flips that were learned alone, over all tensors.
        completed: `<t', t>` with those that the constraint added.
    """

    bits: dict[str, Bits] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    energy: float = 0.0
    learned: float = 0.0
    completed: float = 0.0

    def add(self, tensor: Matrix, rows: Tensor, position: Tensor, geometry: FlipGeometry, target: float) -> None:
        """Decide some rows of a tensor: flips at or above 0.5, and as many more as the constraint needs."""
        chosen = complete(position, geometry, target)
        width = -(-tensor.columns // 8)
        table = self.bits.setdefault(tensor.name, np.zeros((tensor.rows, width), np.uint8))
        self.columns[tensor.name] = tensor.columns
        table[rows.numpy()] = np.packbits(chosen.numpy(), axis=1)
        taken = (position >= 0.5) & (geometry.delta != 0)
        self.energy += geometry.energy
        self.learned += alignment_of(taken, geometry) * geometry.energy
        self.completed += alignment_of(chosen, geometry) * geometry.energy

    def chosen(self, tensor: str, row: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """f32 `[rows, columns]`, 1 where the flip is taken, for the rows from `row` on.

        Rows of another length than the tensor's are its weights in storage order, filled up with zeros at the end.
        """
        rows, columns = shape
        table, own = self.bits[tensor], self.columns[tensor]
        if columns == own:
            found = np.unpackbits(table[row : row + rows], axis=1, count=columns)
        else:
            flat = np.unpackbits(table, axis=1, count=own).reshape(-1)[row * columns : (row + rows) * columns]
            found = np.pad(flat, (0, rows * columns - len(flat))).reshape(rows, columns)
        return torch.from_numpy(found).to(device).float()


def plan_of(parts: Sequence[MatrixPart], positions: Sequence[Tensor], target: float) -> LearnedPlan:
    """The plan of learned parts; `positions` are f32 `[rows, columns]` per part."""
    plan = LearnedPlan()
    for part, position in zip(parts, positions, strict=True):
        plan.add(part.tensor, part.rows, position.float().cpu(), part.geometry(), target)
    return plan


def add_unmapped(plan: LearnedPlan, matrices: Sequence[Matrix], task: LearnTask, target: float) -> None:
    """Matrices that the torch model does not hold get flips as `ortho` chooses them, to meet the constraint."""
    for matrix in matrices:
        geometry = task.target.geometry(matrix)
        start = shifted_ratio(geometry, matrix.name, task.seed)
        plan.add(matrix, torch.arange(matrix.rows), start, geometry, target)


def shifted_ratio(geometry: FlipGeometry, name: str, seed: int) -> Tensor:
    """Each weight's place in its cell plus a random shift of its own: f32 `[rows, columns]` in [0, 1]."""
    shift = SliceKey(seed, name, 0).jitter(geometry.ratio.shape, torch.device("cpu")).mul_(SHIFT_WIDTH)
    return shift.mul_(geometry.delta != 0).add_(geometry.ratio).clamp_(0.0, 1.0)
