"""EFRAP: error-guided flipped rounding, layer by layer (arXiv 2405.12725). Calibrated; no end-to-end backward pass.

The idea
--------
Per layer, learn a rounding variable `h` per weight (0 keeps the plain code, 1 takes the flip) that keeps what the layer
computes on calibration text while turning the rounding errors to their other side, the largest first:

    |Q(W)x - Wx|^2  +  sum |e0| * BCE(h, other side)  +  0.01 * (1 - |2h - 1|^2)

The paper finds the backdoor's activation in the rounding error, so turning it breaks the link, and the activation term
spends the flips where the layer's output does not change.

How it runs
-----------
The activations enter through their Gram matrix only (`qguard_edge.learned.layerwise`), one decoder block is in the device's
memory at a time (`qguard_edge.learned.blocks`), and every layer is learned by itself, in full-precision company.

What the paper leaves open, and what we chose
---------------------------------------------
It was written for image classifiers; each term is divided by its own size so that its weights carry over. Embedding and
output matrix have no activations here: they get the plain squared error in the first term. An alignment constraint as
`ortho`'s is there too (`--efrap-alignment`), off by default.

Cost and failure
----------------
Seconds per layer, memory of one block. Each layer is judged alone: errors that add up across layers are not seen.
"""

import time
from typing import Any

import torch
from torch import Tensor

from qguard_edge.defenses.base import SliceKey
from qguard_edge.defenses.options import EfrapOptions
from qguard_edge.learned.blockwise import efrap_positions
from qguard_edge.learned.defense import LearnedDefense, load_model_and_text, unmapped_warnings
from qguard_edge.learned.plan import LearnedPlan, add_unmapped, plan_of
from qguard_edge.learned.settings import LearnReport, LearnTask
from qguard_edge.runtimes.devices import torch_threads
from quant_grids import Flips


class Efrap(LearnedDefense[EfrapOptions]):
    """See the module docstring."""

    def __init__(self, options: EfrapOptions) -> None:
        super().__init__(options)
        self.plan = LearnedPlan()

    def prepare(self, task: LearnTask) -> LearnReport:
        """See `LearnedDefense.prepare`."""
        started, target = time.perf_counter(), self.options.alignment
        with torch_threads(task.threads):
            loaded, calibration = load_model_and_text(task)
            parts = task.target.parts(dict(loaded.model.named_parameters()), self.options.name)
            loaded.model.to(torch.device("cpu"))
            positions, losses = efrap_positions(loaded, parts.parts, calibration.samples, self.options, task)
            self.plan = plan_of(parts.parts, positions, target)
            learned = self.plan.learned / max(self.plan.energy, 1e-30)
            add_unmapped(self.plan, parts.unmapped, task, target)
        return LearnReport(
            calibration_sha256=calibration.sha256,
            calibration_source=calibration.source,
            samples=len(calibration.samples),
            losses=tuple(losses),
            alignment_learned=learned,
            alignment=self.plan.completed / max(self.plan.energy, 1e-30),
            unmapped=tuple(matrix.name for matrix in parts.unmapped),
            warnings=(*calibration.warnings, *unmapped_warnings(parts, "the alignment constraint alone")),
            seconds=time.perf_counter() - started,
        )

    def choose(self, flips: Flips, key: SliceKey, share: Any = None) -> Tensor:
        """See `Defense.choose`."""
        return self.plan.chosen(key.tensor, key.row, flips.ratio.shape, flips.ratio.device).mul_(flips.ratio > 0)
