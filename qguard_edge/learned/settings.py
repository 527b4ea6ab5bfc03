"""Settings and report of learning; values only, so that defenses and the command line share them."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from qguard_edge.defenses.base import Inputs
from qguard_edge.learned.calibration import Calibration, CalibrationOptions
from qguard_edge.learned.matrices import Target
from qguard_edge.progress import NoProgress, Progress


@dataclass(frozen=True)
class LearnTask:
    """A model to learn the rounding of.

    Attributes:
        model: Hugging Face folder, or a full-precision GGUF that transformers reads.
        target: what is rounded.
        seed: of everything random.
        device: where the model runs.
        calibration: which text.
        text: that text, where it is known already, else None.
        inputs: what is known of the matrices' inputs, for a rule that draws codes; else None.
        checkpoint: file that keeps the state of an unfinished run; None keeps none.
        threads: for torch, 0 for all cores.
        progress: told about each step.
        trust_remote_code: run the Python code that the model's folder brings.
    """

    model: Path
    target: Target
    seed: int
    device: torch.device
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    text: Calibration | None = None
    inputs: Inputs | None = None
    checkpoint: Path | None = None
    threads: int = 0
    progress: Progress = field(default_factory=NoProgress)
    trust_remote_code: bool = False


@dataclass(frozen=True)
class LearnReport:
    """What was learned.

    Attributes:
        calibration_sha256: of the text.
        calibration_source: file name, or what made the text.
        samples: texts used.
        losses: pairs. `quantguard`: of each step, the divergence on its text, and on the text set aside as last measured; with
            block scope, of each block, its output error on the text set aside before and after. `efrap`: of each layer, the
            soft and the rounded output error over plain rounding's.
        alignment_learned: over all learned tensors, with what learning wanted alone.
        alignment: with what the constraint made of it.
        moved: codes that were moved from where error feedback had drawn them; 0 for a rule without draws.
        unmapped: tensors that could not be learned.
        warnings: one sentence each.
        seconds: of the learning, calibration text included.
    """

    calibration_sha256: str
    calibration_source: str
    samples: int
    losses: tuple[tuple[float, float], ...]
    alignment_learned: float
    alignment: float
    moved: int = 0
    unmapped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
