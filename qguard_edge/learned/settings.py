"""Settings and report of learning; values only, so that defenses and the command line share them."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from qguard_edge.learned.calibration import CalibrationOptions
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
        checkpoint: file that keeps the state of an unfinished run; None keeps none.
        threads: for torch, 0 for all cores.
        progress: told about each step.
    """

    model: Path
    target: Target
    seed: int
    device: torch.device
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    checkpoint: Path | None = None
    threads: int = 0
    progress: Progress = field(default_factory=NoProgress)


@dataclass(frozen=True)
class LearnReport:
    """What was learned.

    Attributes:
        calibration_sha256: of the text.
        calibration_source: file name, or what made the text.
        samples: texts used.
        losses: of each step: total and KL (block scope: mean squared error of the block's output).
        alignment_learned: over all learned tensors, before further flips were taken for the constraint.
        alignment: after.
        unmapped: tensors that could not be learned and got the constraint alone.
        warnings: one sentence each.
        seconds: of the learning, calibration text included.
    """

    calibration_sha256: str
    calibration_source: str
    samples: int
    losses: tuple[tuple[float, float], ...]
    alignment_learned: float
    alignment: float
    unmapped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
