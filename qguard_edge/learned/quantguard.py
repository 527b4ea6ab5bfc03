"""QuantGuard: error feedback, then gradient steps on the model's predictions (arXiv 2606.29239). Calibrated.

The idea
--------
The paper learns which of two levels each weight takes, so that the quantized model predicts what full precision predicts. In
full precision a conditioned backdoor is asleep, so a model that predicts what full precision predicts has none; and what
brings the two together makes a better file as well. Scales stay: only code bits change.

Here the variables do not begin at plain rounding. The codes are first *drawn* by `qguard_edge.defenses.feedback`, the same rule
with the same inputs, text, constraint and seed as `--defense feedback`: without steps the file is that one, byte for
byte. The steps then move single codes to the level across their weight. They see what error feedback cannot: what layers do to
one another, and how much each error matters to the predictions.

What holds whatever the steps do
--------------------------------
* The constraint: `<t', t> <= c <t, t>` on every tensor, or what the draws left if that is more (`constraint`). The forward pass
  sees the plan with it, so learning works around it.
* No harm: the divergence is measured on text that is set aside, and the best plan is the result, the drawn codes among them
  (`endtoend`; block by block each block's output error).
* The entropy: a floor under what is left of the draws' is computed from the number of moved codes (`moved`).

What the paper leaves open, and what we chose
---------------------------------------------
Units of the terms, learning rate, number of steps, and how a variable is driven to an end are not given. We take sign steps with
a hard forward pass; the paper's Adam on a rectified sigmoid begins at full precision itself, which throws the drawn codes away.
Its term that turns the largest errors is what the constraint does, exactly; its term for the distance from the weights changed
nothing. Figures are in docs/quantguard.md.

Cost and failure
----------------
Minutes instead of seconds, and the model in memory twice in f32 plus 26 bytes per weight. The steps need a model that
transformers can run, and one code per weight: a GGUF of a scalar format, or a folder for bitsandbytes (`--to nf4|fp4|int8`).
`--quantguard-scope block` learns one decoder block at a time on its output error, for models that do not fit.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qguard_edge.defenses.base import MatrixRule, SliceKey
from qguard_edge.defenses.feedback import Feedback
from qguard_edge.defenses.options import QuantGuardOptions
from qguard_edge.learned.blockwise import BlockScope
from qguard_edge.learned.calibration import Calibration, CalibrationOptions, load_calibration
from qguard_edge.learned.checkpoint import fingerprint_of
from qguard_edge.learned.constraint import alignment_of
from qguard_edge.learned.defense import LearnedDefense, load_model_and_text, unmapped_warnings
from qguard_edge.learned.endtoend import TOKENS_ASIDE, EndToEnd
from qguard_edge.learned.matrices import Drawing, Drawn
from qguard_edge.learned.moved import MovedCodes, MovedRule
from qguard_edge.learned.parts import Matrix, MatrixPart, MatrixParts
from qguard_edge.learned.settings import LearnReport, LearnTask
from qguard_edge.runtimes.devices import torch_threads
from qguard_edge.runtimes.hf import HfModel
from quant_grids import Flips, Grid

FEWEST_ASIDE = 4  # texts of a file that are left over; with fewer, others are taken


@dataclass(frozen=True)
class Steps:
    """What the steps came to.

    Attributes:
        plans: bool `[rows, columns]` of each part, on the CPU: the flips that are taken.
        wanted: the same for what learning asked for at last, whatever the constraint allowed.
        losses: see `LearnReport`.
        warnings: one sentence each.
    """

    plans: Sequence[Tensor]
    wanted: Sequence[Tensor]
    losses: Sequence[tuple[float, float]]
    warnings: tuple[str, ...] = ()


class QuantGuard(LearnedDefense[QuantGuardOptions]):
    """See the module docstring."""

    wants_inputs = True

    def __init__(self, options: QuantGuardOptions) -> None:
        super().__init__(options)
        self.rule = Feedback(options.feedback)
        self.moved: dict[str, MovedCodes] = {}

    @property
    def runs_transformers(self) -> bool:
        """See `LearnedDefense.runs_transformers`."""
        return self.options.steps > 0

    def prepare(self, task: LearnTask) -> LearnReport | None:
        """See `LearnedDefense.prepare`."""
        if not self.options.steps:
            return None
        started = time.perf_counter()
        with torch_threads(task.threads):
            task.progress.stage("Drawing the codes that the steps start from", 0, "")
            drawn = task.target.draw(self.rule, Drawing(task.seed, task.inputs, task.threads, task.device))
            loaded, text = load_model_and_text(task)
            parts = task.target.parts(dict(loaded.model.named_parameters()), self.options.name, drawn)
            steps = self._steps(loaded, parts.parts, text, text_aside(loaded, text, task.calibration), task)
            self.moved = moved_matrices(parts, steps.plans, drawn, task)
        wanted, taken = shares_left(parts.parts, steps.wanted, steps.plans)
        return LearnReport(
            calibration_sha256=text.sha256,
            calibration_source=text.source,
            samples=len(text.samples),
            losses=tuple(steps.losses),
            alignment_learned=wanted,
            alignment=taken,
            moved=sum(one.moved for one in self.moved.values()),
            unmapped=tuple(matrix.name for matrix in parts.unmapped),
            warnings=(*steps.warnings, *unmapped_warnings(parts, "the codes of error feedback")),
            seconds=time.perf_counter() - started,
        )

    def _steps(
        self,
        loaded: HfModel,
        parts: Sequence[MatrixPart],
        text: Calibration,
        aside: Sequence[Sequence[int]],
        task: LearnTask,
    ) -> Steps:
        options = self.options
        if options.scope == "block":
            blocks = BlockScope(loaded, parts, text.samples, aside, options, task)
            plans = blocks.run()
            return Steps(plans, blocks.wanted, blocks.losses)
        run = EndToEnd(loaded, parts, text.samples, aside, options, task, self._fingerprint(task, text))
        losses = run.run()
        warnings: tuple[str, ...] = ()
        if not any(bool(plan.any()) for plan in run.best):
            warnings = ("the gradient steps did not help on text set aside: the file keeps the codes as they were drawn",)
        return Steps(run.best, [one.wanted().cpu() for one in run.variables], losses, warnings)

    def _fingerprint(self, task: LearnTask, text: Calibration) -> str:
        """Everything that decides the result."""
        return fingerprint_of(
            {
                "options": asdict(self.options),
                "seed": task.seed,
                "text": text.sha256,
                "seqlen": task.calibration.seqlen,
                "plain": task.target.fingerprint(),
                "device": task.device.type,
            }
        )

    def choose(self, flips: Flips, key: SliceKey, share: Any = None) -> Tensor:
        """See `Feedback.choose`: flips do not say enough."""
        return self.rule.choose(flips, key, share)

    def factor(self, grid: Grid, gram: Tensor | None, columns: int, device: torch.device) -> Any:
        """See `Defense.factor`; nothing once the codes are settled."""
        return None if self.moved else self.rule.factor(grid, gram, columns, device)

    def fit(self, grid: Grid, factor: Any, blocks: Tensor, weights: Tensor, key: SliceKey) -> MatrixRule:
        """See `Defense.fit`."""
        if self.moved:
            return MovedRule(grid, self.moved[key.tensor])
        return self.rule.fit(grid, factor, blocks, weights, key)


def moved_matrices(
    parts: MatrixParts, plans: Sequence[Tensor], drawn: Mapping[str, Drawn], task: LearnTask
) -> dict[str, MovedCodes]:
    """Every matrix with its final codes."""
    chosen: dict[str, tuple[Matrix, Tensor]] = {}
    for part, plan in zip(parts.parts, plans, strict=True):
        matrix = part.tensor
        if matrix.name not in chosen:
            chosen[matrix.name] = matrix, torch.zeros(matrix.rows, matrix.columns, dtype=torch.bool)
        chosen[matrix.name][1][part.rows] = plan
    made = {}
    for name, one in drawn.items():
        matrix_and_table = chosen.get(name)
        if matrix_and_table is None:  # not in the torch model
            made[name] = MovedCodes(one, one.blocks, 0, 0)
            continue
        matrix, table = matrix_and_table
        moved = int(table.sum())
        blocks = task.target.flipped(matrix, one, table) if moved else one.blocks
        made[name] = MovedCodes(one, blocks, moved, table.numel())
    return made


def shares_left(parts: Sequence[MatrixPart], *plans: Sequence[Tensor]) -> list[float]:
    """What each of some plans leaves of plain rounding's error, over all parts; one part's geometry at a time."""
    energy, left = 0.0, [0.0] * len(plans)
    for part, *chosen in zip(parts, *plans, strict=True):
        geometry = part.geometry()
        energy += geometry.energy
        left = [so_far + alignment_of(plan, geometry) * geometry.energy for so_far, plan in zip(left, chosen, strict=True)]
    return [one / max(energy, 1e-30) for one in left]


def text_aside(loaded: HfModel, text: Calibration, options: CalibrationOptions) -> list[tuple[int, ...]]:
    """Some `TOKENS_ASIDE` tokens that no Gram matrix and no step has seen.

    Where the mix is in the calibration text these are the rows behind those that were used. Of a user's own text they are texts
    of the same file that were left over; if it has none, or if the model wrote the text, rows of the mix.
    """
    used = set(text.samples)
    count = max(1, TOKENS_ASIDE * len(text.samples) // sum(map(len, text.samples)))
    if not options.self_written:
        more = replace(options, samples=len(text.samples) + (1 if options.packed else 4) * count)
        rows = [row for row in load_calibration(more, loaded, "", 0).samples if row not in used]
        if len(rows) >= min(count, FEWEST_ASIDE):
            return rows[:count]
    rows = list(load_calibration(CalibrationOptions(None, count, options.seqlen), loaded, "", 0).samples)
    return [row for row in rows if row not in used] or rows
