"""FlipGuard: flip the weights with the largest quantization error, block by block (arXiv 2606.28962). Data-free.

The idea
--------
Weights that sit near the edge of their rounding interval are the attacker's lever and the cheapest to turn. Per block, the
top share `rho` by normalised error `|e0| / D` is rounded the other way, with a local adjustment that keeps the block's error
small.

What the paper leaves open, and what we chose
---------------------------------------------
Neither the share nor the adjustment is public. Ours: in each storage block take flips in falling order of `|e0| / D` until
either `share` of the block's weights are taken, or their added squared error reaches `bound` times the block's own squared
error, whichever comes first. The weights that hold the lowest and the highest code of their sub-block define its scale and
are left alone unless `--flipguard-extremes` is given.

Cost and failure
----------------
One pass, no data. The share is the same for every block whatever its errors look like: a block without payload pays as well.
Deterministic, so an attacker who knows it can place weights for its rounding.
"""

from typing import Any

import torch
from torch import Tensor

from qguard_edge.defenses.base import Defense, SliceKey
from qguard_edge.defenses.greedy import bins_of, take_from_top
from qguard_edge.defenses.options import FlipGuardOptions
from quant_grids import Flips, ScalarFlips

BINS = 64


class FlipGuard(Defense[FlipGuardOptions]):
    """See the module docstring."""

    def choose(self, flips: Flips, key: SliceKey, share: Any = None) -> Tensor:
        """See `Defense.choose`."""
        width = flips.ratio.shape[1] // flips.energy.shape[1]
        ratio = flips.ratio
        if isinstance(flips, ScalarFlips) and not self.options.extremes:
            ratio = ratio * _not_extreme(flips).view(ratio.shape)
        ratio = ratio.reshape(-1, width)
        gain = flips.gain.view(-1, width)
        usable = ratio.sign()
        # ratio = gain / (cost + 2 gain), so the added squared error is gain / ratio - 2 gain; negative for misplaced codes.
        cost = (gain / ratio.clamp(min=1e-9) - 2.0 * gain).clamp_(min=0.0).mul_(usable)
        bins = bins_of(ratio.clone(), BINS)
        wanted = torch.full((len(bins),), self.options.share * width, device=ratio.device)
        by_count = take_from_top(bins, usable, wanted, BINS)
        by_error = take_from_top(bins, cost, self.options.bound * flips.energy.view(-1), BINS)
        return (by_count * by_error).mul_(usable).view(flips.ratio.shape)


def _not_extreme(flips: ScalarFlips) -> Tensor:
    """0.0 where a weight holds the lowest or highest code of its sub-block, else 1.0: f32 `[n_sub_blocks, sub_size]`."""
    codes = flips.codes.reshape(len(flips.square), -1)
    low, high = codes.amin(1, keepdim=True), codes.amax(1, keepdim=True)
    return ((codes != low) & (codes != high)).float()
