"""Gaussian noise before rounding (arXiv 2405.18137, Egashira et al.; there the simplest defense that helps). Data-free.

The idea
--------
The attacker placed each weight inside a rounding interval; noise pushes many out of it before they are rounded:

    W' = W + N(0, sigma^2),  then the unmodified quantizer on W'

What the paper leaves open, and what we chose
---------------------------------------------
The paper reports that sigma = 1e-3 cures Phi-2 at INT8 and 1e-2 ruins it, and that the best sigma differs per model. So
the default is relative: sigma is a multiple (`--noise-relative`) of half the tensor's median rounding step, which needs no
tuning per model; `--noise-sigma` gives it absolutely. `--noise-mode requantize` is true to the paper: llama.cpp quantizes the
noised model, scales included. `fixed-grid` keeps the plain scales and takes the flips that the noise would cause; noise
that would carry a weight to a level *further* away than the two that bracket it is not followed.

Cost and failure
----------------
One more quantization. Noise is spent on every weight alike, also where it does nothing but harm: at equal effect on the
payload it costs more fidelity than a choice by error. Large scales (outliers) make sigma large for all weights of a tensor.
"""

from typing import Any

import torch
from torch import Tensor

from qguard_edge.defenses.base import Defense, SliceKey
from qguard_edge.defenses.options import NoiseOptions
from quant_grids import Flips, ScalarFlips
from quant_grids.errors import UnsupportedError


class Noise(Defense[NoiseOptions]):
    """See the module docstring."""

    def __init__(self, options: NoiseOptions) -> None:
        super().__init__(options)
        self.requantizes = options.mode == "requantize"

    def move(self, weights: Tensor, plain: Tensor, half_width: float, key: SliceKey) -> Tensor:
        """See `Defense.move`."""
        sigma = self.options.sigma or self.options.relative * half_width
        return weights + sigma * key.normal(weights.shape, weights.device)

    def choose(self, flips: Flips, key: SliceKey, share: Any = None) -> Tensor:
        """Flips whose weight the noise carries past the middle between its two levels.

        In level units the noise is `sigma / scale`; with the relative sigma, and the scale of each sub-block in place of the
        tensor's median, it is `relative / 2` throughout.
        """
        if not isinstance(flips, ScalarFlips):
            raise UnsupportedError("--noise-mode fixed-grid needs one code per weight; use --noise-mode requantize")
        noise = key.normal(flips.ratio.shape, flips.ratio.device)
        if self.options.sigma:
            inverse = torch.where(flips.square > 0, flips.square.rsqrt(), 0.0)
            noise = (noise.view(len(inverse), -1) * inverse).view(noise.shape).mul_(self.options.sigma)
        else:
            noise.mul_(0.5 * self.options.relative)
        # The error is measured from the weight: noise towards the other level adds to it.
        return (flips.ratio + noise > 0.5).float() * (flips.ratio > 0)
