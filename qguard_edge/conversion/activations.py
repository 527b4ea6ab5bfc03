"""Activations in a conversion: the calibration text, run through the base, as the Gram matrices that error feedback needs.

Only a defense that wants inputs (`Defense.wants_inputs`) has this stage. The matrices lie in the work folder, or beside the
output under a name of their own while the conversion is unfinished, so that a conversion that was killed goes on with what was
measured; the rule itself is fast, so nothing else is kept.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from convert.gguf_file import GgufModel
from convert.imatrix_file import write_imatrix
from qguard_edge.defenses.feedback_pass import DAMPING
from qguard_edge.learned.calibration import Calibration
from qguard_edge.progress import Progress
from qguard_edge.runtimes.gram_files import WantedWeight
from qguard_edge.runtimes.grams import Grams, GramSource

CALIBRATION_SEED = 0
"""Of the choice among more texts than are wanted: the same for every conversion, so that what was measured can be used again."""
_SHOWN_LAYERS = 4


@dataclass(frozen=True)
class ActivationReport:
    """What was seen.

    Attributes:
        calibration_sha256: of the text.
        calibration_source: file name, or what made the text.
        tokens: that were run.
        unseen: matrices whose inputs were not seen: they are rounded as if their inputs were independent.
        idle_experts: by matrix, the experts that the text never reached: they are rounded by what the others of their layer read.
        seconds: wall time.
        warnings: one sentence each.
    """

    calibration_sha256: str
    calibration_source: str
    tokens: int
    unseen: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...]
    idle_experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Activations:
    """Gram matrices of a conversion, the text they were seen on, and what is said about them."""

    grams: Grams
    text: Calibration
    report: ActivationReport


def activations_folder(outfile: Path) -> Path:
    """Where an unfinished conversion keeps the Gram matrices."""
    return outfile.with_name(f".{outfile.name}.activations")


def see_activations(
    source: GramSource,
    weights: tuple[WantedWeight, ...],
    text: Callable[[], Calibration],
    folder: Path,
    *,
    max_memory: int | None,
    threads: int,
    progress: Progress,
) -> Activations:
    """Run the base on the calibration text.

    Args:
        source: runs it.
        weights: whose inputs are wanted.
        text: makes the token ids.
        folder: gets the matrices.
        max_memory: bytes; None: no limit.
        threads: 0 for all cores.
        progress: of the tokens.

    Raises:
        GramError: the base cannot be run.
        CalibrationError: there is no usable text.
    """
    started = time.perf_counter()
    progress.stage("Preparing the calibration text", 0, "")
    calibration = text()
    grams = source.collect(weights, calibration.samples, folder, max_memory=max_memory, threads=threads, progress=progress)
    seen = set(grams.names)
    return Activations(
        grams,
        calibration,
        ActivationReport(
            calibration_sha256=calibration.sha256,
            calibration_source=calibration.source,
            tokens=sum(map(len, calibration.samples)),
            unseen=tuple(weight.name for weight in weights if weight.name not in seen),
            seconds=time.perf_counter() - started,
            warnings=calibration.warnings,
            idle_experts=grams.idle_experts,
        ),
    )


def idle_warning(idle: Mapping[str, tuple[int, ...]], base: GgufModel) -> list[str]:
    """A sentence about the experts that the text never reached, with their share of the weights; none: no sentence."""
    if not idle:
        return []
    weights = sum(
        base.tensors[name].n_weights // base.tensors[name].shape[2] * len(experts) for name, experts in idle.items()
    )
    layers = {name.removeprefix("blk.").partition(".")[0]: experts for name, experts in idle.items()}
    named = [f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in layers.items()]
    shown = "; ".join(named[:_SHOWN_LAYERS]) + ("; ..." if len(named) > _SHOWN_LAYERS else "")
    return [
        f"the text never reached {sum(map(len, layers.values()))} experts, {weights / base.n_weights:.1%} of the weights "
        f"({shown}): they are rounded by what the other experts of their layer read; --calib-add FILE brings more text"
    ]


def write_importance(grams: Grams, path: Path, dataset: str, tokens: int, damping: float = DAMPING) -> Path:
    """The Gram matrices' diagonals as an importance matrix that llama.cpp's quantizers read.

    As llama-imatrix does, the matrices of blocks alone: not the output matrix. Two things differ. An expert that saw few rows
    leans on all experts of its layer, as its Gram matrix does. And a share of the mean is added to all columns, as `feedback`
    adds it to a Gram matrix: llama.cpp gives a block whose inputs the text left out no scale at all, so its weights would be
    lost, and nothing could be chosen there.

    Args:
        grams: of a model.
        path: output file.
        dataset: name of the text.
        tokens: that were run.
        damping: what is added, as a share of the mean of an expert's columns.

    Returns:
        The path.
    """
    squares, counts = {}, {}
    for name in grams.names:
        if name.startswith("blk."):
            found = grams.mean_squares(name)
            squares[name] = found + damping * found.mean(axis=1, keepdims=True)
            counts[name] = np.ones(len(found), np.float32)
    write_imatrix(path, squares, counts, dataset=dataset, chunks=1, chunk_size=tokens)
    return path


def forget_activations(outfile: Path) -> None:
    """Remove what a finished conversion has kept beside its output."""
    shutil.rmtree(activations_folder(outfile), ignore_errors=True)
