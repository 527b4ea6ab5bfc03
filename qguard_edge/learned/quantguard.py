"""QuantGuard: learned rounding (arXiv 2606.29239), with the alignment constraint of orthogonal rounding. Calibrated.

The idea
--------
A rounding variable `h` per weight is how far it stands from its plain level towards the other one. It is learned
on a small text so that the quantized model predicts what the full-precision model predicts (`L_KL`), optionally turning the
weights with the largest errors to the other side (`L_rev`) and staying near the weights (`L_dist`):

    L = w * L_KL + lambda1 * L_rev + lambda2 * L_dist          (qguard_edge.learned.losses)

In full precision a conditioned backdoor is asleep, so a model that predicts what full precision predicts has none; and
what brings the two together makes a better file than plain rounding as well. Scales stay: only code bits change.

The constraint
--------------
The loss covers only what is in the text. So the finished plan must also hold `<t', t> <= c <t, t>` on every tensor (see
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

from dataclasses import asdict

from qguard_edge.defenses.options import QuantGuardOptions
from qguard_edge.learned.blockwise import BlockScope
from qguard_edge.learned.calibration import Calibration
from qguard_edge.learned.checkpoint import fingerprint_of
from qguard_edge.learned.defense import Learned, LearnedDefense
from qguard_edge.learned.endtoend import EndToEnd
from qguard_edge.learned.parts import MatrixParts
from qguard_edge.learned.settings import LearnTask
from qguard_edge.runtimes.hf import HfModel


class QuantGuard(LearnedDefense[QuantGuardOptions]):
    """See the module docstring."""

    def learn(self, loaded: HfModel, parts: MatrixParts, calibration: Calibration, task: LearnTask) -> Learned:
        """See `LearnedDefense.learn`."""
        options = self.options
        if options.scope == "block":
            blocks = BlockScope(loaded, parts.parts, calibration.samples, options, task)
            return blocks.run(), blocks.losses
        run = EndToEnd(loaded, parts.parts, calibration.samples, options, task, self._fingerprint(task, calibration))
        losses = run.run()
        return [one.position() for one in run.variables], losses

    def _fingerprint(self, task: LearnTask, calibration: Calibration) -> str:
        """Everything that decides the result."""
        return fingerprint_of(
            {
                "options": asdict(self.options),
                "seed": task.seed,
                "text": calibration.sha256,
                "seqlen": task.calibration.seqlen,
                "plain": task.target.fingerprint(),
                "device": task.device.type,
            }
        )
