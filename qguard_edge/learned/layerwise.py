"""EFRAP's objective, layer by layer, without running the layer: the activations enter through their Gram matrix only.

For a layer `y = W x`, with the error matrix `E = v(h) - W` and `H = mean of x x^T` over the calibration tokens,

    mean |Q(W)x - Wx|^2 = tr(E H E^T),        derivative by E:  2 E H

so each step is one matrix product, whatever the number of calibration tokens. The terms, per layer:

    tr(E H E^T) / tr(E0 H E0^T)                        what the layer computes is kept; 1 for plain rounding
    + flip * sum r * -log h / sum r                    rounding errors are turned, the largest first (r = |e0| / D)
    + binarize * mean of 1 - |2h - 1|^2                h is driven to an end

The paper sums |e0| times the cross-entropy in units of its weights; dividing each term by its own size makes the weights of
the terms mean the same for every layer and model.
"""

import torch
from torch import Tensor

from qguard_edge.defenses.options import EfrapOptions
from qguard_edge.learned.losses import reversal_slope
from qguard_edge.learned.parts import FlipGeometry
from qguard_edge.learned.variables import Relaxed


def layer_loss(error: Tensor, gram: Tensor | None) -> Tensor:
    """`tr(E H E^T)`; H is the identity where no activations are known."""
    return (error.square() if gram is None else (error @ gram) * error).sum()


def learn_layer(
    geometry: FlipGeometry, weights: Tensor, gram: Tensor | None, options: EfrapOptions
) -> tuple[Tensor, float, float]:
    """Learn one layer.

    Args:
        geometry: of the layer's rows.
        weights: f32 `[rows, columns]`, full precision, in the same order.
        gram: f32 `[columns, columns]` or None.
        options: weights of the terms, steps, rate.

    Returns:
        f32 `[rows, columns]` h in [0, 1]; the layer's squared output error at the start and with the soft weights at the end.
    """
    count = geometry.value.numel()
    variables = Relaxed(geometry, binarize=options.binarize, n_weights=count)
    start = layer_loss(geometry.value - weights, gram)
    scale = 1.0 / max(float(start), 1e-30)
    everywhere = geometry.ratio > 0
    total = max(float(geometry.ratio.sum()), 1e-30)
    for step in range(options.steps):
        error = variables.values() - weights
        slope = (error if gram is None else error @ gram).mul_(geometry.delta).mul_(2.0 * scale)
        if options.flip > 0:
            h = variables.position()
            slope.add_(reversal_slope(h, geometry.ratio, everywhere), alpha=options.flip / total)
        variables.step(slope, options.rate, (step + 1) / options.steps)
    end = layer_loss(variables.values() - weights, gram)
    return variables.position(), float(start), float(end)


def hard_error(position: Tensor, geometry: FlipGeometry, weights: Tensor, gram: Tensor | None) -> float:
    """Squared output error of the rounded layer, in the units of `learn_layer`."""
    taken = (position >= 0.5).float()
    return float(layer_loss(torch.addcmul(geometry.value, geometry.delta, taken) - weights, gram))
