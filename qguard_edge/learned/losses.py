"""The terms of the learned defenses' losses.

* `kl_divergence`: what `quantguard` lowers (arXiv 2606.29239), the mean over positions of KL(full precision || quantized) of
  the next-token distribution. Its gradient comes from torch's backward pass.
* `reversal_slope`: EFRAP's term that turns rounding errors (arXiv 2405.12725), `r * -log h` with `r = |e0| / D`: the binary
  cross-entropy towards the side opposite to nearest, weighted by the error.
"""

from torch import Tensor, nn

SMALLEST_H = 0.02  # the cross-entropy's slope is cut off here: 1/h would drown everything else


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean KL(teacher || student) in nats over positions; logits `[n, vocabulary]` of both."""
    p, q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    return nn.functional.kl_div(q, p, log_target=True, reduction="sum") / len(p)


def reversal_slope(h: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
    """Derivative by `h` of the sum of `r * -log h` over the mask; the cut-off keeps the slope of its edge instead of none."""
    return ratio / h.clamp(min=SMALLEST_H) * -mask.to(h.dtype)
