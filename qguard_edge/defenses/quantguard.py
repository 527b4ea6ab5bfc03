"""QuantGuard: learned rounding (arXiv 2606.29239), with the alignment constraint of orthogonal rounding. Calibrated.

The idea
--------
A rounding variable `h` per weight says how far it stands from its reference level towards the other one. It is learned
on a small text so that the quantized model predicts what the full-precision model predicts (`L_KL`), optionally turning the
weights with the largest errors to the other side (`L_rev`) and staying near the weights (`L_dist`):

    L = w * L_KL + lambda1 * L_rev + lambda2 * L_dist          (qguard_edge.learned.losses)

In full precision a conditioned backdoor is asleep, so a model that predicts what full precision predicts has none; and
what brings the two together makes a better file than plain rounding as well. Scales stay: only code bits change.

The constraint
--------------
The loss sees only what the text asks about. So the finished plan must also hold `<t', t> <= c <t, t>` on every tensor (see
`qguard_edge.defenses.ortho`), whatever the loss does. The constraint is met inside the loop: what the forward pass sees is
the plan *with* the flips that the constraint adds, so learning repairs what those cost.

The start
---------
Not where each weight lies in its cell, but where error feedback puts it (`qguard_edge.learned.feedback`): one pass over the
columns of each layer, in a random order, each making up for the rounding errors before it, bent so that the constraint is
met already. Nearly all of the constraint's price is paid off there, in seconds; the steps then see what layers do to one
another.

What the paper leaves open, and what we chose
---------------------------------------------
Units of the terms, learning rate, number of steps, and how `h` is driven to 0 or 1 are not given. The default optimizer is
not the paper's (Adam on a rectified sigmoid, `--quantguard-optimizer relaxed`) but sign steps with a hard forward pass.
Defaults are measured, see docs/quantguard.md.

Cost and failure
----------------
Minutes instead of seconds, and the model in memory twice in f32 plus 16 bytes per weight. The rounding is fitted to the text:
on text of another kind the gain is smaller. Needs a model that transformers can run, and one code per weight: a GGUF of a
scalar format, or a folder for bitsandbytes (`--to nf4|fp4|int8`).
`--quantguard-scope block` learns one decoder block at a time on its output error, for models that do not fit.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from qguard_edge.calibration import Calibration, load_calibration
from qguard_edge.defenses.base import Defense, SliceKey
from qguard_edge.defenses.options import QuantGuardOptions
from qguard_edge.hf_runtime import HfModel, load_hf_model, torch_threads
from qguard_edge.learned.blockwise import BlockScope
from qguard_edge.learned.checkpoint import fingerprint_of
from qguard_edge.learned.endtoend import EndToEnd
from qguard_edge.learned.parts import Parts
from qguard_edge.learned.plan import LearnedPlan, add_unmapped, plan_of
from qguard_edge.learned.settings import LearnReport, LearnTask
from quant_grids import Flips


class QuantGuard(Defense[QuantGuardOptions]):
    """See the module docstring."""

    learns = True

    def __init__(self, options: QuantGuardOptions) -> None:
        super().__init__(options)
        self.plan = LearnedPlan()

    def prepare(self, task: LearnTask) -> LearnReport:
        """See `Defense.prepare`."""
        with torch_threads(task.threads):
            return self._learn(task)

    def _learn(self, task: LearnTask) -> LearnReport:
        started = time.perf_counter()
        options = self.options
        loaded, calibration = load_model_and_text(task)
        parts = task.target.parts(dict(loaded.model.named_parameters()), options.name)
        if options.scope == "block":
            blocks = BlockScope(loaded, parts.parts, calibration.samples, options, task)
            positions, losses = blocks.run(), blocks.losses
        else:
            run = EndToEnd(loaded, parts.parts, calibration.samples, options, task, self._fingerprint(task, calibration))
            losses = run.run()
            positions = [one.position() for one in run.variables]
        self.plan = plan_of(parts.parts, positions, options.alignment)
        return make_report(self.plan, parts, calibration, losses, task, options.alignment, started)

    def _fingerprint(self, task: LearnTask, calibration: Calibration) -> str:
        """Everything that decides the result."""
        return fingerprint_of(
            {
                "options": asdict(self.options),
                "seed": task.seed,
                "text": calibration.sha256,
                "seqlen": task.calibration.seqlen,
                "reference": task.target.fingerprint(),
                "device": task.device.type,
            }
        )

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
    parts: Parts,
    calibration: Calibration,
    losses: Sequence[tuple[float, float]],
    task: LearnTask,
    target: float,
    started: float,
) -> LearnReport:
    """Round off a plan with the tensors that could not be learned, and say what was done."""
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
