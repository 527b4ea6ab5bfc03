"""The three terms of QuantGuard's loss (arXiv 2606.29239), and the derivatives of those that are local to a weight.

    L = w * L_KL + lambda1 * L_rev + lambda2 * L_dist

* `L_KL`: mean over positions of KL(full precision || quantized) of the next-token distribution. Its gradient comes from
  torch's backward pass.
* `L_rev` (error-guided reversal): over the top `k` share of weights by normalised error `r = |e0| / D`, the mean of
  `r * -log h`: the binary cross-entropy towards the side opposite to nearest, weighted by the error.
* `L_dist`: squared distance of the soft weight from full precision, `(h - r)^2 D^2`, summed per tensor, over the tensor's
  own squared error: 1 for plain rounding. The paper gives no units; this way lambda2 means the same for every model.

Both local terms are averages over the whole model, so that their derivatives per weight are comparable with L_KL's, which
each weight shares with all others.
"""

import torch
from torch import Tensor

from qguard_edge.learned.parts import FlipGeometry

SMALLEST_H = 0.02  # the cross-entropy's slope is cut off here: 1/h would drown everything else


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean KL(teacher || student) in nats over positions; logits `[n, vocabulary]` of both."""
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") / len(p)


def reversal_mask(ratio: Tensor, share: float) -> Tensor:
    """bool, the top `share` of the weights by normalised error; weights without a flip are never among them."""
    wanted = round(share * ratio.numel())
    if wanted < 1:
        return torch.zeros_like(ratio, dtype=torch.bool)
    edge = ratio.reshape(-1).kthvalue(ratio.numel() - wanted + 1).values
    return (ratio >= edge) & (ratio > 0)


def reversal(h: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
    """Sum of `r * -log h` over the mask; divide by the number of masked weights of the model."""
    return (ratio * -h.clamp(min=SMALLEST_H).log())[mask].sum()


def reversal_slope(h: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
    """Derivative of `reversal` by `h`; the cut-off keeps the slope of its edge instead of none."""
    return ratio / h.clamp(min=SMALLEST_H) * -mask.to(h.dtype)


def distance(h: Tensor, geometry: FlipGeometry) -> Tensor:
    """Squared distance from full precision of the weights that have a flip, over plain rounding's squared error."""
    soft = (h - geometry.ratio) * geometry.delta
    return soft.square().sum() / max(geometry.energy, 1e-30)


def distance_slope(h: Tensor, geometry: FlipGeometry) -> Tensor:
    """Derivative of `distance` by `h`."""
    return (h - geometry.ratio) * geometry.delta.square() * (2.0 / max(geometry.energy, 1e-30))
