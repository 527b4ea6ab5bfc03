"""The rounding variables of one part and the two ways to move them.

`SignSteps` (SignRound, arXiv 2309.05516): `h` starts where `qguard_edge.learned.starts` puts it and moves by a fixed step
against the sign of its slope. The forward pass is *hard*: the weight is at the one level or the other, the model is the
quantized model, and the slope passes straight through the threshold. No optimizer state. How far `h` can travel in total
(the sum of all steps) bounds which weights can flip at all: it is the regulariser.

`Relaxed` (AdaRound, arXiv 2004.10568, as QuantGuard uses it): `h = clip(1.2 * sigmoid(a) - 0.1, 0, 1)`, a *soft* forward
pass and Adam on `a`. The soft model starts as the full-precision model itself, so something has to drive `h` to an end: a
small term `1 - |2h - 1|^2` whose weight rises during the run. (QuantGuard's text does not name one; EFRAP's does.)
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from qguard_edge.learned.constraint import TAKEN, threshold_of
from qguard_edge.learned.parts import FlipGeometry

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
ADAM_BETAS, ADAM_EPSILON = (0.9, 0.99), 1e-12


class Variables(ABC):
    """Rounding variables of one part.

    Args:
        geometry: of its weights.
        target: of the alignment constraint.
        start: f32 `[rows, columns]` in [0, 1], where they start; None: where the weights lie between their levels.
    """

    def __init__(self, geometry: FlipGeometry, target: float, start: Tensor | None = None) -> None:
        self.geometry, self.target = geometry, target

    @abstractmethod
    def position(self) -> Tensor:
        """f32 `[rows, columns]`, h in [0, 1]."""

    @abstractmethod
    def values(self) -> Tensor:
        """`[rows, columns]`, what the forward pass uses for the weights now."""

    @abstractmethod
    def step(self, slope: Tensor, rate: float, progress: float) -> None:
        """Move the variables.

        Args:
            slope: f32 `[rows, columns]`, derivative of the loss by `h`; may be overwritten.
            rate: size of the step.
            progress: share of the run that is done, 0 to 1.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on later."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""


class SignSteps(Variables):
    """See the module docstring."""

    def __init__(self, geometry: FlipGeometry, target: float, start: Tensor | None = None) -> None:
        super().__init__(geometry, target, start)
        self.h = (geometry.ratio if start is None else start).float().clone()
        self.threshold = TAKEN
        self.settle()

    def settle(self) -> None:
        """Find the threshold that meets the constraint."""
        self.threshold = threshold_of(self.h, self.geometry, self.target)

    def position(self) -> Tensor:
        """See `Variables.position`."""
        return self.h

    def values(self) -> Tensor:
        """See `Variables.values`: the completed plan."""
        taken = (self.h >= self.threshold).to(self.geometry.delta.dtype)
        return torch.addcmul(self.geometry.value, self.geometry.delta, taken)

    def step(self, slope: Tensor, rate: float, progress: float) -> None:
        """See `Variables.step`."""
        self.h.sub_(slope.sign_(), alpha=rate).clamp_(0.0, 1.0)

    def state(self) -> dict[str, Tensor]:
        """See `Variables.state`."""
        return {"h": self.h, "threshold": torch.tensor([self.threshold], dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `Variables.restore`."""
        self.h.copy_(state["h"])
        self.threshold = float(state["threshold"])


class Relaxed(Variables):
    """See the module docstring; Adam is written out because each part is stepped while the backward pass still runs."""

    def __init__(
        self,
        geometry: FlipGeometry,
        target: float,
        start: Tensor | None = None,
        *,
        binarize: float = 0.0,
        n_weights: int = 1,
    ) -> None:
        super().__init__(geometry, target, start)
        first = (geometry.ratio if start is None else start).float()
        inner = (first.clamp(0.001, 0.999) - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)
        self.a = torch.logit(inner)
        self.mean, self.square = torch.zeros_like(self.a), torch.zeros_like(self.a)
        self.count = 0
        self.binarize, self.n_weights = binarize, n_weights

    def position(self) -> Tensor:
        """See `Variables.position`."""
        return self.a.sigmoid().mul_(STRETCH_HIGH - STRETCH_LOW).add_(STRETCH_LOW).clamp_(0.0, 1.0)

    def values(self) -> Tensor:
        """See `Variables.values`: between the levels."""
        return torch.addcmul(self.geometry.value, self.geometry.delta, self.position().to(self.geometry.delta.dtype))

    def step(self, slope: Tensor, rate: float, progress: float) -> None:
        """See `Variables.step`: one Adam step on `a`."""
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

    def state(self) -> dict[str, Tensor]:
        """See `Variables.state`."""
        return {"a": self.a, "mean": self.mean, "square": self.square, "count": torch.tensor([self.count])}

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `Variables.restore`."""
        self.a.copy_(state["a"])
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
        self.count = int(state["count"])
