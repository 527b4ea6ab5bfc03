"""What the learned defenses share: the model is run once, before any code is chosen, and what was learned is looked up later."""

from abc import abstractmethod
from typing import Generic, TypeVar

import torch

from qguard_edge.defenses.base import Defense
from qguard_edge.defenses.options import EfrapOptions, QuantGuardOptions
from qguard_edge.learned.calibration import Calibration, load_calibration
from qguard_edge.learned.parts import MatrixParts
from qguard_edge.learned.settings import LearnReport, LearnTask
from qguard_edge.runtimes.hf import HfModel, load_hf_model

Options = TypeVar("Options", bound=QuantGuardOptions | EfrapOptions)


class LearnedDefense(Defense[Options], Generic[Options]):
    """Learns in `prepare`, and chooses by what it has learned."""

    @property
    def runs_transformers(self) -> bool:
        """Whether learning runs the model, so that transformers has to know it."""
        return True

    @abstractmethod
    def prepare(self, task: LearnTask) -> LearnReport | None:
        """Learn from the whole model; None where the options leave nothing to learn."""


def load_model_and_text(task: LearnTask) -> tuple[HfModel, Calibration]:
    """The full-precision model, on the CPU still, and its calibration samples: those that are known already, else new ones."""
    loaded = load_hf_model(task.model, device=torch.device("cpu"), trust_remote_code=task.trust_remote_code)
    if task.text is not None:
        return loaded, task.text
    key = task.target.model_key() if task.calibration.self_written else ""
    if task.calibration.self_written:
        loaded.model.to(task.device)
    return loaded, load_calibration(task.calibration, loaded, key, task.seed, task.progress)


def unmapped_warnings(parts: MatrixParts, instead: str) -> list[str]:
    """Names the matrices that the torch model does not hold, and what they got."""
    if not parts.unmapped:
        return []
    return [
        f"{len(parts.unmapped)} tensors were not found in the torch model and got {instead}, the first is "
        f"{parts.unmapped[0].name!r}"
    ]
