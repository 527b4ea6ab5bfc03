"""QVec: subtract a multiple of the quantization vector before rounding (arXiv 2606.20254). Data-free with a fixed strength.

The idea
--------
Rounding adds the vector `t = Q(W) - W`, and with it the payload. Task arithmetic takes a part of it away in advance:

    W' = W - lambda * (Q(W) - W),  then the unmodified quantizer on W'

On a fixed uniform grid this is a threshold rule: the moved weight lies `(1 + lambda) * |e0|` from its old level, so it
rounds the other way exactly when `|e0| / D > 1 / (2 * (1 + lambda))`.

What the paper leaves open, and what we chose
---------------------------------------------
lambda comes from a short search on unlabelled data in the paper, whose score it does not give; ours is the mean KL to full
precision on a text (`--qvec-text`, `qguard_edge.compare.qvec_search`), and without a text lambda is a fixed default.
`--qvec-mode requantize` is true to the paper: scales are fitted anew to the moved weights. `fixed-grid` keeps the
plain scales and applies the threshold rule, so that only code bits change.

Cost and failure
----------------
One more quantization. The rule is deterministic, so an attacker who knows it can place weights for *its* rounding. With
scales fitted anew the new error is not what the threshold rule says; k-quants differ most.
"""

from typing import Any

from torch import Tensor

from qguard_edge.defenses.base import Defense, SliceKey
from qguard_edge.defenses.options import QVecOptions
from quant_grids import Flips


class QVec(Defense[QVecOptions]):
    """See the module docstring."""

    def __init__(self, options: QVecOptions) -> None:
        super().__init__(options)
        self.requantizes = options.mode == "requantize"

    def move(self, weights: Tensor, plain: Tensor, half_width: float, key: SliceKey) -> Tensor:
        """See `Defense.move`."""
        return weights - self.options.strength * (plain - weights)

    def choose(self, flips: Flips, key: SliceKey, share: Any = None) -> Tensor:
        """Flips whose normalised error exceeds `1 / (2 * (1 + lambda))`."""
        return (flips.ratio > 0.5 / (1.0 + self.options.strength)).float()
