"""The rounding variables of one part and the two ways to move them.

`SignSteps` (SignRound, arXiv 2309.05516), of `quantguard`: a flip away from the drawn code is taken at `h >= 0.5`. `h` starts
where the weight lies between its drawn level and the other one, but at `LAST_START` at most, and moves by a fixed step against
the sign of its slope. So drawn codes come first, and one moves only after the steps have agreed a dozen times more often than
not: nearer to 0.5, the first signs alone would turn an eighth of all codes. The forward pass is *hard*: the weight is at the one
level or the other, the model is the quantized model, and the slope passes straight through the threshold. No optimizer state.
How far `h` can travel in total (the sum of all steps) bounds which codes can move at all: it is the regulariser.

`Relaxed` (AdaRound, arXiv 2004.10568), of `efrap`: `h = clip(1.2 * sigmoid(a) - 0.1, 0, 1)`, a *soft* forward pass and Adam
on `a`. The soft model starts as the full-precision model itself, so something has to drive `h` to an end: a small term
`1 - |2h - 1|^2` whose weight rises during the run.
"""

import torch
from torch import Tensor

from qguard_edge.learned.constraint import kept
from qguard_edge.learned.parts import FlipGeometry

LAST_START = 0.45  # of a weight near the middle of its levels, or drawn to the farther one
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
ADAM_BETAS, ADAM_EPSILON = (0.9, 0.99), 1e-12


class SignSteps:
    """See the module docstring.

    Args:
        geometry: of the part's weights, at the drawn codes.
        target: share c of plain rounding's error that may be left.

    Attributes:
        h: f32 `[rows, columns]` in [0, 1].
        plan: bool `[rows, columns]`, the flips that are taken: what the constraint allows of those at 0.5 or more.
    """

    def __init__(self, geometry: FlipGeometry, target: float) -> None:
        self.geometry, self.target = geometry, target
        self.h = geometry.ratio.float().clamp(max=LAST_START)
        self.settle()

    def settle(self) -> None:
        """Take the flips that the variables ask for."""
        self.plan = kept(self.h, self.geometry, self.target)

    def values(self) -> Tensor:
        """`[rows, columns]`, the weights with the flips taken."""
        return torch.addcmul(self.geometry.value, self.geometry.delta, self.plan.to(self.geometry.delta.dtype))

    def step(self, slope: Tensor, rate: float) -> None:
        """Move the variables; `settle` takes the flips.

        Args:
            slope: f32 `[rows, columns]`, derivative of the loss by the weights; overwritten.
            rate: size of the step.
        """
        self.h.sub_(slope.mul_(self.geometry.delta).sign_(), alpha=rate).clamp_(0.0, 1.0)

    def wanted(self) -> Tensor:
        """Bool `[rows, columns]`, the flips that the variables ask for, whatever the constraint allows."""
        return (self.h >= 0.5) & (self.geometry.delta != 0)


class Relaxed:
    """See the module docstring; Adam is written out because each layer is stepped with a slope of its own making.

    Args:
        geometry: of the weights, at the plain codes.
        binarize: weight of the term that drives the variables to an end.
        n_weights: over which that term is averaged.
    """

    def __init__(self, geometry: FlipGeometry, *, binarize: float = 0.0, n_weights: int = 1) -> None:
        self.geometry = geometry
        inner = (geometry.ratio.float().clamp(0.001, 0.999) - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)
        self.a = torch.logit(inner)
        self.mean, self.square = torch.zeros_like(self.a), torch.zeros_like(self.a)
        self.count = 0
        self.binarize, self.n_weights = binarize, n_weights

    def position(self) -> Tensor:
        """f32 `[rows, columns]`, h in [0, 1]."""
        return self.a.sigmoid().mul_(STRETCH_HIGH - STRETCH_LOW).add_(STRETCH_LOW).clamp_(0.0, 1.0)

    def values(self) -> Tensor:
        """`[rows, columns]`, what the forward pass uses for the weights now: between the levels."""
        return torch.addcmul(self.geometry.value, self.geometry.delta, self.position().to(self.geometry.delta.dtype))

    def step(self, slope: Tensor, rate: float, progress: float) -> None:
        """One Adam step on `a`.

        Args:
            slope: f32 `[rows, columns]`, derivative of the loss by `h`; overwritten.
            rate: size of the step.
            progress: share of the run that is done, 0 to 1.
        """
        h = self.position()
        if self.binarize > 0:
            # d/dh of 1 - (2h - 1)^2 is -4 (2h - 1).
            slope.add_((2.0 * h).sub_(1.0), alpha=-4.0 * self.binarize * progress / self.n_weights)
        inner = self.a.sigmoid()
        slope *= (STRETCH_HIGH - STRETCH_LOW) * inner * (1.0 - inner) * ((h > 0) & (h < 1))
        self.count += 1
        first, second = ADAM_BETAS
        self.mean.mul_(first).add_(slope, alpha=1.0 - first)
        self.square.mul_(second).addcmul_(slope, slope, value=1.0 - second)
        top = self.mean / (1.0 - first**self.count)
        bottom = (self.square / (1.0 - second**self.count)).sqrt_().add_(ADAM_EPSILON)
        self.a.addcdiv_(top, bottom, value=-rate)
