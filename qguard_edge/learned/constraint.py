"""The alignment constraint: whatever the loss does, the plan keeps `<t', t> <= c * <t, t>` on every tensor.

Each weight has a rounding variable `h`; a flip is taken when `h >= 0.5`. Where these flips leave more of the old error
direction than `c`, the cheapest further ones are taken, and the learned variable gives the cost: the threshold falls
until the gain suffices (the selection of `qguard_edge.defenses.greedy`, with `h` as the score). Learning and completing do
not fight each other, because the *completed* plan is what the forward pass sees while the variables are learned.
"""

import torch
from torch import Tensor

from qguard_edge.defenses.greedy import bins_of, boundary_of, histogram_of, take
from qguard_edge.learned.parts import FlipGeometry

BINS = 4096
TAKEN = 0.5


def needed_gain(geometry: FlipGeometry, target: float) -> float:
    """Gain that the flips of a part must bring; nothing for `target >= 1`."""
    return max(0.0, 1.0 - target) * geometry.energy


def threshold_of(position: Tensor, geometry: FlipGeometry, target: float) -> float:
    """The largest threshold of at most 0.5 at which the flips meet the constraint, to the width of a bin (1/4096).

    Args:
        position: f32 `[rows, columns]`, the rounding variables.
        geometry: of the same rows.
        target: share c of the old error direction that may be left; 1 or more: no constraint.
    """
    need = needed_gain(geometry, target)
    gain = geometry.gain()
    if need <= 0 or float(torch.dot(gain.view(-1), _taken(position, TAKEN).view(-1))) >= need:
        return TAKEN
    boundary, _ = _boundary(position, gain, need)
    return max(0.0, boundary / BINS)


def complete(position: Tensor, geometry: FlipGeometry, target: float) -> Tensor:
    """The plan: bool `[rows, columns]`, the flips at or above 0.5 and as many more as the constraint needs, exactly."""
    need = needed_gain(geometry, target)
    gain = geometry.gain()
    possible = geometry.delta != 0
    taken = _taken(position, TAKEN)
    if need <= 0 or float(torch.dot(gain.view(-1), taken.view(-1))) >= need:
        return taken.bool() & possible
    _, rest = _boundary(position, gain, need)
    index, missing = rest
    bins = bins_of(position.reshape(1, -1).clone(), BINS)
    chosen = take(bins, gain.view(1, -1), index.view(1, 1), missing.view(1, 1))
    return (chosen.view(position.shape) > 0) & possible


def alignment_of(chosen: Tensor, geometry: FlipGeometry) -> float:
    """`<t', t> / <t, t>` of a plan: 1 for plain rounding itself."""
    if geometry.energy <= 0:
        return 1.0
    return 1.0 - float((geometry.gain() * chosen).double().sum()) / geometry.energy


def _taken(position: Tensor, threshold: float) -> Tensor:
    return (position >= threshold).to(position.dtype)


def _boundary(position: Tensor, gain: Tensor, need: float) -> tuple[float, tuple[Tensor, Tensor]]:
    """The bin at which the gain, collected from the top, suffices; as a number, and as an argument of `take`."""
    bins = bins_of(position.reshape(1, -1).clone(), BINS)
    histogram = histogram_of(bins, gain.reshape(1, -1), BINS).double()
    index, rest = boundary_of(histogram, torch.tensor([need], dtype=torch.float64, device=position.device))
    return float(index), (index.to(position.dtype), rest.to(position.dtype))
