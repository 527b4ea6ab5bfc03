"""A tiny model with its plain file, as learning gets them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile, GgufModel
from convert.hf.base import write_base_gguf
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.defenses.feedback import Feedback
from qguard_edge.defenses.options import QuantGuardOptions
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.learned.matrices import Drawing, Drawn, GgufTarget
from qguard_edge.learned.parts import MatrixPart, MatrixParts
from qguard_edge.learned.settings import LearnTask
from qguard_edge.rounding.gguf import coverage_of
from qguard_edge.runtimes.hf import HfModel, load_hf_model


class NothingSeen:
    """Inputs of no matrix are known: codes are drawn as if all were independent."""

    names: tuple[str, ...] = ()

    def of(self, tensor: str, expert: int | None = None) -> torch.Tensor:
        raise KeyError(tensor)

    def shares(self, tensor: str) -> tuple[str, ...]:
        raise KeyError(tensor)


@dataclass(frozen=True)
class Setup:
    """A model, its plain file, its parts, and the task of learning it."""

    loaded: HfModel
    parts: MatrixParts
    task: LearnTask
    target: GgufTarget

    def again(self, **changes: Any) -> LearnTask:
        return replace(self.task, **changes)

    def draw(self, seed: int = 7) -> Mapping[str, Drawn]:
        """Codes to start from."""
        rule = Feedback(QuantGuardOptions().feedback)
        return self.target.draw(rule, Drawing(seed, NothingSeen(), 1, self.task.device))

    @cached_property
    def drawn_parts(self) -> tuple[MatrixPart, ...]:
        """The parts with drawn codes."""
        return self.target.parts(dict(self.loaded.model.named_parameters()), "quantguard", self.draw()).parts


def make_setup(folder: Path, work: Path, to: str) -> Setup:
    base, plain = work / "base.gguf", work / f"{to}.gguf"
    write_base_gguf(folder, base)
    quantize(base, plain, QuantizeOptions(parse_file_type(to), threads=2))
    model, made = GgufModel(base), GgufFile(plain)
    tensors = coverage_of(model, made).protected
    loaded = load_hf_model(folder)
    target = GgufTarget(model, made, tensors)
    parts = target.parts(dict(loaded.model.named_parameters()), "quantguard")
    calibration = CalibrationOptions(samples=8, seqlen=24)
    task = LearnTask(folder, target, seed=7, device=torch.device("cpu"), calibration=calibration)
    return Setup(loaded, parts, task, target)
