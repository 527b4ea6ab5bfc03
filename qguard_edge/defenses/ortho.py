"""Orthogonal rounding: take away what the attacker relied on, at the least added error. Ours (no paper); data-free.

The idea
--------
A conditioned backdoor lives in the quantization error `t = Q(W) - W`: in full precision it is absent, and rounding adds
exactly the vector that the attacker prepared. So choose flips (see `quant_grids.base`) such that the new error `t'` keeps
only a share `c` of it:

    <t', t> = c * <t, t>        c = 1: plain rounding,  c = 0: orthogonal,  c < 0: over-corrected

Taking the flip of a weight lowers `<t', t>` by `gain = s^2 |e| D` and adds `cost = s^2 (D^2 - 2 |e| D)` to the squared error.
The cheapest way to a given total gain is greedy by gain per cost, which for a scalar grid is by the normalised error
`|e| / D`: a threshold. For errors spread evenly over a cell, c = 0 flips 18% of the weights and adds 20% to the squared
error; stochastic rounding, which also cancels the direction on average, adds 100%.

Why the decisions are random
----------------------------
A public deterministic rule is just another quantizer: an attacker could place every weight so that *this* rule's rounding
is the malicious one. So the threshold is soft. Each weight's normalised error is shifted by a random amount of up to
`width / 2` to either side before it is compared, and the threshold is set so that the *actual* gain meets the target.
The seed is drawn when the conversion runs, after the attacker has published. `width = 0` is the greedy rule.

How it runs
-----------
Per group (each row, or the whole tensor): a histogram of the shifted errors, weighted by gain; walk down from the top until
the gain is enough; take every flip above that bin, and as many of the bin's own, in storage order, as are still missing.
No sorting; the result is exact to one flip.

When it fails
-------------
The payload must live in the rounding (outlier injection does not), and what is left of it must be too weak at `c`: an
attacker with a strong payload and much margin survives a small dose. On a clean model c = 0 costs about a fifth more
squared error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qguard_edge.defenses.base import Defense, SliceKey
from qguard_edge.defenses.options import OrthoOptions
from quant_grids import Flips

ROW_BINS = 128
TENSOR_BINS = 4096


@dataclass(frozen=True)
class Survey:
    """One slice's part of a tensor-wide decision: gain per bin (f64 `[TENSOR_BINS]`) and squared error."""

    histogram: Tensor
    energy: float


@dataclass(frozen=True)
class Share:
    """What one slice is to do: take every flip above `boundary`, and `rest` more gain from that bin."""

    boundary: int
    rest: float


class Ortho(Defense[OrthoOptions]):
    """See the module docstring."""

    def __init__(self, options: OrthoOptions) -> None:
        super().__init__(options)
        self.surveys = options.group == "tensor"

    def _bins(self, flips: Flips, key: SliceKey, count: int) -> Tensor:
        """Bin of each flip's shifted error: whole f32 numbers 0..count-1 of the shape of `flips.ratio`."""
        score = flips.ratio * float(count)
        if self.options.width > 0:
            score.add_(key.jitter(flips.ratio.shape, flips.ratio.device), alpha=self.options.width * count)
        return score.clamp_(0, count - 1).floor_()

    def survey(self, flips: Flips, key: SliceKey) -> Survey:
        """See `Defense.survey`."""
        bins = self._bins(flips, key, TENSOR_BINS).view(-1).int()
        histogram = torch.bincount(bins, flips.gain.view(-1).double(), TENSOR_BINS)
        return Survey(histogram.cpu(), float(flips.energy.double().sum()))

    def settle(self, surveys: Sequence[Survey]) -> list[Share]:
        """See `Defense.settle`; the boundary bin's missing gain is spread in proportion to what each slice has in it."""
        total = torch.stack([survey.histogram for survey in surveys]).sum(0)
        need = (1.0 - self.options.target) * sum(survey.energy for survey in surveys)
        boundary, rest = _boundary(total.view(1, -1), torch.tensor([need], dtype=torch.float64))
        index, missing = int(boundary), float(rest)
        if index < 0:
            return [Share(-1, 0.0) for _ in surveys]
        whole = float(total[index])
        parts = [missing * float(survey.histogram[index]) / whole if whole > 0 else 0.0 for survey in surveys]
        return [Share(index, part) for part in parts]

    def choose(self, flips: Flips, key: SliceKey, share: Any = None) -> Tensor:
        """See `Defense.choose`."""
        if self.options.target >= 1.0:
            return torch.zeros_like(flips.ratio)
        if isinstance(share, Share):
            bins = self._bins(flips, key, TENSOR_BINS)
            boundary = torch.tensor([[float(share.boundary)]], device=bins.device)
            rest = torch.tensor([[share.rest]], device=bins.device)
            return _take(bins.view(1, -1), flips.gain.view(1, -1), boundary, rest).view(bins.shape)
        bins = self._bins(flips, key, ROW_BINS)
        rows = len(bins)
        # Every row has a histogram of its own: shift row r's bins to r * ROW_BINS.
        offsets = torch.arange(0, rows * ROW_BINS, ROW_BINS, dtype=torch.int32, device=bins.device).view(-1, 1)
        index = bins.int().add_(offsets).view(-1)
        histogram = torch.bincount(index, flips.gain.view(-1), rows * ROW_BINS).view(rows, ROW_BINS)
        boundary, rest = _boundary(histogram, (1.0 - self.options.target) * flips.energy)
        return _take(bins, flips.gain, boundary.view(-1, 1), rest.view(-1, 1))


def _boundary(histogram: Tensor, need: Tensor) -> tuple[Tensor, Tensor]:
    """The bin at which the gain, collected from the top, reaches what is needed.

    Args:
        histogram: `[groups, bins]`, gain per bin.
        need: `[groups]`, gain wanted.

    Returns:
        int32 `[groups]` bin index (-1: all bins together are not enough) and `[groups]` gain still missing above it.
    """
    collected = histogram.flip(-1).cumsum(-1).flip(-1)  # gain of this bin and all above
    boundary = (collected >= need.unsqueeze(-1)).sum(-1).sub_(1)
    above = torch.cat((collected, torch.zeros_like(collected[:, :1])), dim=-1)
    rest = need - above.gather(-1, (boundary + 1).unsqueeze(-1)).squeeze(-1)
    return boundary.to(need.dtype), rest


def _take(bins: Tensor, gain: Tensor, boundary: Tensor, rest: Tensor) -> Tensor:
    """1.0 for flips above the boundary bin, and for those in it, in storage order, until `rest` is met to half a flip.

    All masks are floats made by clamping whole numbers: torch's comparisons are five times slower than its arithmetic.
    """
    distance = bins - boundary
    above = distance.clamp(0.0, 1.0)
    inside = distance.abs_().clamp_(max=1.0).neg_().add_(1.0)
    gains = gain * inside
    # A flip in the boundary bin is taken while more than half of its gain is still missing when its turn comes.
    missing = gains.mul(0.5).sub_(gains.cumsum(-1)).add_(rest)
    return missing.sign_().clamp_(min=0.0).mul_(inside).add_(above)
