"""The alignment constraint: whatever the loss does, the plan keeps `<t', t> <= c * <t, t>` on every tensor.

Each weight has a rounding variable `h`; a flip is wanted when `h >= 0.5`.

From **plain** codes (`efrap`), `complete` takes further flips where the wanted ones leave more of the old error direction than
`c`, the cheapest first, with the learned variable as the cost (the selection of `qguard_edge.defenses.greedy`).

From **drawn** codes (`quantguard`), which meet the constraint before any flip, `kept` gives up wanted flips that would break
it. Learning and giving up do not fight each other, because what is left is what the forward pass sees.
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


def complete(position: Tensor, geometry: FlipGeometry, target: float) -> Tensor:
    """The plan: bool `[rows, columns]`, the flips at or above 0.5 and as many more as the constraint needs, exactly."""
    need = needed_gain(geometry, target)
    gain = geometry.gain()
    possible = geometry.delta != 0
    taken = _taken(position, TAKEN)
    if need <= 0 or float(torch.dot(gain.view(-1), taken.view(-1))) >= need:
        return taken.bool() & possible
    index, missing = _boundary(position, gain, need)
    bins = bins_of(position.reshape(1, -1).clone(), BINS)
    chosen = take(bins, gain.view(1, -1), index.view(1, 1), missing.view(1, 1))
    return (chosen.view(position.shape) > 0) & possible


def kept(position: Tensor, geometry: FlipGeometry, target: float) -> Tensor:
    """The plan from drawn codes: bool `[rows, columns]`, the flips at or above 0.5 that the constraint allows.

    Drawn codes meet the constraint before any flip, as near as error feedback comes to it. Flips that lead back towards plain
    rounding use up what is left, and where they would use more, those nearest to 0.5 are given up. So the plan holds
    `<t', t> <= c <t, t>`, or what the drawn codes left if that is more.

    Args:
        position: f32 `[rows, columns]`, the rounding variables.
        geometry: of the same rows, at the drawn codes.
        target: share c of the old error direction that may be left.
    """
    taken = (position >= TAKEN) & (geometry.delta != 0)
    index = taken.view(-1).nonzero().squeeze(1)
    raised = -geometry.gain().view(-1)[index].double()
    excess = geometry.left + float(raised.sum()) - max(target * geometry.energy, geometry.left)
    if excess <= 0:
        return taken
    worse = (raised > 0).nonzero().squeeze(1)
    order = worse[position.reshape(-1)[index[worse]].argsort(stable=True)]
    given_up = int((raised[order].cumsum(0) < excess).sum()) + 1
    taken.view(-1)[index[order[:given_up]]] = False
    return taken


def alignment_of(chosen: Tensor, geometry: FlipGeometry) -> float:
    """`<t', t> / <t, t>` of a plan: 1 for plain rounding itself."""
    if geometry.energy <= 0:
        return 1.0
    return (geometry.left - float((geometry.gain() * chosen).double().sum())) / geometry.energy


def _taken(position: Tensor, threshold: float) -> Tensor:
    return (position >= threshold).to(position.dtype)


def _boundary(position: Tensor, gain: Tensor, need: float) -> tuple[Tensor, Tensor]:
    """The bin at which the gain, collected from the top, suffices, and the gain still missing above it."""
    bins = bins_of(position.reshape(1, -1).clone(), BINS)
    histogram = histogram_of(bins, gain.reshape(1, -1), BINS).double()
    index, rest = boundary_of(histogram, torch.tensor([need], dtype=torch.float64, device=position.device))
    return index.to(position.dtype), rest.to(position.dtype)
