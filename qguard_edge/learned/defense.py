"""What the learned defenses share: a plan that is learned once for the whole model and looked up tensor by tensor."""

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from qguard_edge.defenses.base import Defense, SliceKey
from qguard_edge.defenses.options import EfrapOptions, QuantGuardOptions
from qguard_edge.learned.calibration import Calibration, load_calibration
from qguard_edge.learned.parts import MatrixParts
from qguard_edge.learned.plan import LearnedPlan, add_unmapped, plan_of
from qguard_edge.learned.settings import LearnReport, LearnTask
from qguard_edge.runtimes.devices import torch_threads
from qguard_edge.runtimes.hf import HfModel, load_hf_model
from quant_grids import Flips

Options = TypeVar("Options", bound=QuantGuardOptions | EfrapOptions)
Learned = tuple[list[Tensor], list[tuple[float, float]]]
"""Rounding variables of each part, f32 `[rows, columns]`, and what learning reports of its losses."""


class LearnedDefense(Defense[Options], Generic[Options]):
    """Learns in `prepare`, answers `choose` from the plan."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.plan = LearnedPlan()

    @abstractmethod
    def learn(self, loaded: HfModel, parts: MatrixParts, calibration: Calibration, task: LearnTask) -> Learned:
        """Learn on the text; `loaded` is the full-precision model."""

    def prepare(self, task: LearnTask) -> LearnReport:
        """Learn from the whole model what `choose` will answer."""
        started, target = time.perf_counter(), self.options.alignment
        with torch_threads(task.threads):
            loaded, calibration = load_model_and_text(task)
            parts = task.target.parts(dict(loaded.model.named_parameters()), self.options.name)
            positions, losses = self.learn(loaded, parts, calibration, task)
            self.plan = plan_of(parts.parts, positions, target)
            return make_report(self.plan, parts, calibration, losses, task, target, started)

    def choose(self, flips: Flips, key: SliceKey, share: Any = None) -> Tensor:
        """See `Defense.choose`."""
        return self.plan.chosen(key.tensor, key.row, flips.ratio.shape, flips.ratio.device).mul_(flips.ratio > 0)


def load_model_and_text(task: LearnTask) -> tuple[HfModel, Calibration]:
    """The full-precision model, on the CPU still, and its calibration samples."""
    loaded = load_hf_model(task.model, device=torch.device("cpu"))
    key = task.target.model_key() if task.calibration.file is None else ""
    if task.calibration.file is None:
        loaded.model.to(task.device)
    calibration = load_calibration(task.calibration, loaded, key, task.seed, task.progress)
    return loaded, calibration


def make_report(
    plan: LearnedPlan,
    parts: MatrixParts,
    calibration: Calibration,
    losses: Sequence[tuple[float, float]],
    task: LearnTask,
    target: float,
    started: float,
) -> LearnReport:
    """Round off a plan with the tensors that could not be learned, and report what was done."""
    learned = plan.learned / max(plan.energy, 1e-30)
    add_unmapped(plan, parts.unmapped, task, target)
    warnings = list(calibration.warnings)
    if parts.unmapped:
        warnings.append(
            f"{len(parts.unmapped)} tensors were not found in the torch model and got the alignment constraint alone, "
            f"the first is {parts.unmapped[0].name!r}"
        )
    return LearnReport(
        calibration_sha256=calibration.sha256,
        calibration_source=calibration.source,
        samples=len(calibration.samples),
        losses=tuple(losses),
        alignment_learned=learned,
        alignment=plan.completed / max(plan.energy, 1e-30),
        unmapped=tuple(tensor.name for tensor in parts.unmapped),
        warnings=tuple(warnings),
        seconds=time.perf_counter() - started,
    )
