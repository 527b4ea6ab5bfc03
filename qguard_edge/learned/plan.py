"""From learned variables to what `Defense.choose` answers: packed bits per tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from convert.gguf_file import TensorInfo
from convert.tensor_io import open_reader
from qguard_edge.learned.constraint import alignment_of, complete
from qguard_edge.learned.parts import Geometry, Part, read_geometry
from qguard_edge.learned.settings import LearnTask
from qguard_edge.learned.starts import shifted_ratio

Bits = npt.NDArray[np.uint8]


@dataclass
class LearnedPlan:
    """Which flips to take.

    Attributes:
        bits: per tensor, uint8 `[rows, ceil(columns / 8)]`, one bit per weight.
        energy: squared error of the reference, over all tensors.
        learned: `<t', t>` with the flips that were learned alone, over all tensors.
        completed: `<t', t>` with those that the constraint added.
    """

    bits: dict[str, Bits] = field(default_factory=dict)
    energy: float = 0.0
    learned: float = 0.0
    completed: float = 0.0

    def add(self, tensor: TensorInfo, rows: Tensor, position: Tensor, geometry: Geometry, target: float) -> None:
        """Decide some rows of a tensor: flips at or above 0.5, and as many more as the constraint needs."""
        chosen = complete(position, geometry, target)
        width = -(-tensor.columns // 8)
        table = self.bits.setdefault(tensor.name, np.zeros((tensor.rows, width), np.uint8))
        table[rows.numpy()] = np.packbits(chosen.numpy(), axis=1)
        taken = (position >= 0.5) & (geometry.delta != 0)
        self.energy += geometry.energy
        self.learned += alignment_of(taken, geometry) * geometry.energy
        self.completed += alignment_of(chosen, geometry) * geometry.energy

    def chosen(self, tensor: str, row: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """f32 `[rows, columns]`, 1 where the flip is taken, for the rows from `row` on."""
        rows, columns = shape
        table = self.bits[tensor][row : row + rows]
        return torch.from_numpy(np.unpackbits(table, axis=1, count=columns)).to(device).float()


def plan_of(parts: Sequence[Part], positions: Sequence[Tensor], target: float) -> LearnedPlan:
    """The plan of learned parts; `positions` are f32 `[rows, columns]` per part."""
    plan = LearnedPlan()
    for part, position in zip(parts, positions, strict=True):
        plan.add(part.tensor, part.rows, position.float().cpu(), part.geometry, target)
    return plan


def add_unmapped(plan: LearnedPlan, tensors: Sequence[TensorInfo], task: LearnTask, target: float) -> None:
    """Tensors that the torch model does not hold get flips as `ortho` chooses them, to meet the constraint."""
    paths = [shard.path for shard in task.base.shards]
    with open_reader(task.reference.path, *paths) as reader:
        for tensor in tensors:
            geometry, _ = read_geometry(reader, task.base.tensors[tensor.name], tensor)
            start = shifted_ratio(geometry, tensor.name, task.seed)
            plan.add(tensor, torch.arange(tensor.rows), start, geometry, target)
