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
output matrix have no activations here: they get the plain squared error in the first term. The alignment constraint of
`quantguard` is there too (`--efrap-alignment`), off by default.

Cost and failure
----------------
Seconds per layer, memory of one block. Each layer is judged alone: errors that add up across layers are not seen.
"""

import torch

from qguard_edge.defenses.options import EfrapOptions
from qguard_edge.learned.blockwise import efrap_positions
from qguard_edge.learned.calibration import Calibration
from qguard_edge.learned.defense import Learned, LearnedDefense
from qguard_edge.learned.parts import MatrixParts
from qguard_edge.learned.settings import LearnTask
from qguard_edge.runtimes.hf import HfModel


class Efrap(LearnedDefense[EfrapOptions]):
    """See the module docstring."""

    def learn(self, loaded: HfModel, parts: MatrixParts, calibration: Calibration, task: LearnTask) -> Learned:
        """See `LearnedDefense.learn`."""
        loaded.model.to(torch.device("cpu"))
        return efrap_positions(loaded, parts.parts, calibration.samples, self.options, task)
