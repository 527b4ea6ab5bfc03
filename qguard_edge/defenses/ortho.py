"""Orthogonal rounding: take away what the attacker relied on, at random, so that no attack can aim at it. Ours; data-free.

The idea
--------
A conditioned backdoor lives in the quantization error `t = Q(W) - W`: in full precision it is absent, and rounding adds
exactly the vector that the attacker prepared. So choose flips (see `quant_grids.base`) such that the new error `t'` keeps
only a share `c` of it:

    <t', t> = c * <t, t>        c = 1: plain rounding,  c = 0: orthogonal,  c < 0: over-corrected

Taking the flip of a weight lowers `<t', t>` by `gain = s^2 |e| D` and adds `cost = s^2 (D^2 - 2 |e| D)` to the squared error.
The cheapest way to a given total gain is greedy by gain per cost, which for a scalar grid is by the normalised error
`|e| / D`: a threshold. For errors spread evenly over a cell, c = 0 flips 18% of the weights and adds 20% to the squared error.

Why the decisions are random, and how random
--------------------------------------------
A public deterministic rule is just another quantizer: an attacker could place every weight so that *this* rule's rounding
is the malicious one. So the threshold is soft. Each weight's normalised error `u = |e| / D` is shifted by a random amount of
up to `width / 2` to either side before it is compared, and the threshold is set so that the *actual* gain meets the target.
The seed is drawn when the conversion runs, after the attacker has published. `width = 0` is the greedy rule.

Random is not enough. What all seeds have in common, the mean of a weight's new error over the seeds, is again a public rule:

    mean(t') = s D * (u - P(flip | u)) * sign(e)

With a soft threshold P rises from 0 to 1 over a ramp of length `width`: small errors are never turned, large ones nearly
always, and mean(t') is a third of the size of `t` at width 0.5 (0.15 of it at 0.75). It is orthogonal to `t`, but an attacker who
runs this rule while training finds it: attack success 1.00 at width 0.5. It is zero for every weight only if P(flip | u) = u:
at width 1 and c = 0, which is stochastic rounding with each row's balance made exact, and leaves such an attacker full
precision's 0.01 (docs/results.md). Weights beyond the last level of the grid keep their error at any width.
The price is squared error: 20% more than plain rounding at width 0, 56% at 0.5, 100% at 1. At Q4_0 and FP4 that is more than
many models bear, so the default is 0.5, which stops the attacks that do not aim at it.
`quantguard` stops those that do, and makes a better file than plain rounding; it needs some text.

How it runs
-----------
Per group (each row, each block, or the whole tensor): `qguard_edge.defenses.greedy` takes flips from the top of the shifted
errors until their gain is `(1 - c) <t, t>`. No sorting; the result is exact to half a flip.

When it fails
-------------
The payload must live in the rounding (outlier injection does not), and what is left of it must be too weak at `c`: an
attacker with a strong payload and much margin survives a small dose. At Q6_K the target lies beyond c = 0 (see `TARGETS`), where
the mean is not zero either. An attacker who aims at this rule wins at the default width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qguard_edge.defenses.base import Defense, SliceKey
from qguard_edge.defenses.greedy import bins_of, boundary_of, histogram_of, take, take_from_top
from qguard_edge.defenses.options import OrthoOptions
from quant_grids import Flips, Grid

GROUP_BINS = 128
TENSOR_BINS = 4096
TARGETS = {"Q6_K": -0.25}
"""Targets other than 0, by type. Against Mind the Gap's boxes at Q6_K, attack success is 0.04 at c = 0 and 0.01 at -0.25, for a
clean model's KL of 0.00029 in place of 0.00024 (docs/results.md); at the coarser types c = 0 is enough, and less costs more."""


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
        self.target = 0.0 if options.target is None else options.target

    def on(self, grid: Grid) -> "Ortho":
        """See `Defense.on`: the target, unless one was given."""
        if self.options.target is not None:
            return self
        return Ortho(replace(self.options, target=TARGETS.get(grid.name, 0.0)))

    def _bins(self, flips: Flips, key: SliceKey, count: int) -> Tensor:
        """Bin of each flip's shifted error, f32 of the shape of `flips.ratio`."""
        score = flips.ratio.clone()
        if self.options.width > 0:
            score.add_(key.jitter(flips.ratio.shape, flips.ratio.device), alpha=self.options.width)
        return bins_of(score, count)

    def survey(self, flips: Flips, key: SliceKey) -> Survey:
        """See `Defense.survey`."""
        bins = self._bins(flips, key, TENSOR_BINS).view(1, -1)
        histogram = histogram_of(bins, flips.gain.view(1, -1).double(), TENSOR_BINS)[0]
        return Survey(histogram.cpu(), float(flips.energy.double().sum()))

    def settle(self, surveys: Sequence[Survey]) -> list[Share]:
        """See `Defense.settle`; the boundary bin's missing gain is spread in proportion to what each slice has in it."""
        total = torch.stack([survey.histogram for survey in surveys]).sum(0)
        need = (1.0 - self.target) * sum(survey.energy for survey in surveys)
        boundary, rest = boundary_of(total.view(1, -1), torch.tensor([need], dtype=torch.float64))
        index, missing = int(boundary), float(rest)
        if index < 0:
            return [Share(-1, 0.0) for _ in surveys]
        whole = float(total[index])
        parts = [missing * float(survey.histogram[index]) / whole if whole > 0 else 0.0 for survey in surveys]
        return [Share(index, part) for part in parts]

    def choose(self, flips: Flips, key: SliceKey, share: Any = None) -> Tensor:
        """See `Defense.choose`."""
        if self.target >= 1.0:
            return torch.zeros_like(flips.ratio)
        shape = flips.ratio.shape
        if isinstance(share, Share):
            bins = self._bins(flips, key, TENSOR_BINS).view(1, -1)
            boundary = torch.tensor([[float(share.boundary)]], device=bins.device)
            rest = torch.tensor([[share.rest]], device=bins.device)
            return take(bins, flips.gain.view(1, -1), boundary, rest).view(shape)
        by_row = self.options.group == "row"
        width = shape[1] if by_row else shape[1] // flips.energy.shape[1]
        bins = self._bins(flips, key, GROUP_BINS).view(-1, width)
        limit = flips.energy.sum(-1) if by_row else flips.energy.view(-1)
        chosen = take_from_top(bins, flips.gain.view(-1, width), (1.0 - self.target) * limit, GROUP_BINS)
        return chosen.view(shape)
