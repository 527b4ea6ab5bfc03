"""Error feedback: a start for learned rounding that already uses each layer's inputs. One pass, no gradient.

The idea
--------
A layer computes `W x`. Rounding its weights one column after the other, the error of a column can be made up for by the
columns that are still to come, because their inputs are correlated: with `H = mean of x x^T`, the least output error
`tr(E H E^T)` after fixing column j's error is reached when the others move by `-e_j * U[j, k] / U[j, j]`, where
`U^T U = H^-1` (the update of optimal brain surgeon, arXiv 2210.17323 uses it for free choice of the codes). Here each weight
has two levels only, and what is kept is not the decision but where the moved weight lies between them: the rounding variable
`h`, from which learning goes on.

The constraint, from the start
------------------------------
Minimising `tr(E H E^T) + lean * <E, T>`, with the old error `T = v0 - W`, is the same pass on weights moved by
`-lean * T H^-1`. `lean` is found so that the plan keeps `<E, T> = c * <T, T>`: the constraint is then paid for where the
layer's output does not change, instead of by the flips nearest to the middle.

Why it cannot be predicted
-------------------------
The order of the columns is drawn from the conversion's seed, and every decision depends on all before it: two seeds share
40% of their flips (as many as two runs of `ortho`), at the same output error. Layers without known inputs (an
embedding that is no output matrix) start with `ortho`'s random shift.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qguard_edge.learned.parts import FlipGeometry

DAMPING = 0.01  # of the mean of H's diagonal: keeps H invertible where the text left directions out
COLUMNS = 128  # corrected at once, so that most of the work is matrix products
SEARCH_ROWS, SEARCHES, CLOSE = 256, 6, 0.01


@dataclass(frozen=True)
class Factors:
    """What one pass needs of a layer's inputs.

    Attributes:
        order: int64 `[columns]`, the order in which columns are rounded.
        upper: f32 `[columns, columns]`, upper triangle U with `U^T U = H^-1`, in that order.
        inverse: f32 of the same shape, `H^-1` over the mean of its diagonal, in that order.
    """

    order: Tensor
    upper: Tensor
    inverse: Tensor


def factors_of(gram: Tensor, generator: torch.Generator) -> Factors:
    """Factor a Gram matrix.

    Args:
        gram: f32 `[columns, columns]`, mean of `x x^T`.
        generator: on the CPU, for the order of the columns.
    """
    order = torch.randperm(len(gram), generator=generator).to(gram.device)
    matrix = gram[order][:, order].double()
    matrix.diagonal().add_(DAMPING * matrix.diagonal().mean().clamp(min=1e-30))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    upper = torch.linalg.cholesky(inverse, upper=True)
    return Factors(order, upper.float(), (inverse / inverse.diagonal().mean()).float())


def feed(geometry: FlipGeometry, weights: Tensor, factors: Factors, lean: float) -> Tensor:
    """One pass over the columns.

    Args:
        geometry: f32, of some rows.
        weights: f32 `[rows, columns]`, full precision; not modified.
        factors: of the layer's inputs.
        lean: how strongly the old error direction is avoided.

    Returns:
        f32 `[rows, columns]`, where each weight, corrected for the errors before it, lies between its levels: h in [0, 1].
    """
    order, upper = factors.order, factors.upper
    value, delta = (x[:, order].T.contiguous() for x in (geometry.value, geometry.delta))  # a column lies in one piece
    wanted = weights[:, order].T.contiguous()
    if lean:
        wanted = wanted.sub_(factors.inverse @ (value - wanted), alpha=lean)
    fixed = delta == 0
    scale = (~fixed).float() / (delta + fixed)
    position = torch.empty_like(wanted)
    for start in range(0, len(order), COLUMNS):
        stop = min(start + COLUMNS, len(order))
        errors = torch.empty_like(wanted[start:stop])
        for j in range(start, stop):
            position[j] = (wanted[j] - value[j]) * scale[j]
            rounded = torch.addcmul(value[j], delta[j], (position[j] >= 0.5).float())
            errors[j - start] = (wanted[j] - rounded) / upper[j, j]
            wanted[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1.0)
        wanted[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1.0)
    found = torch.empty_like(geometry.value)
    found[:, order] = position.T
    return found.clamp_(0.0, 1.0)


def lean_for(geometry: FlipGeometry, weights: Tensor, factors: Factors, target: float) -> float:
    """The lean at which a pass meets the alignment `target` to about 0.01, found on some of the rows; 0 if none is needed."""
    index = torch.linspace(0, len(weights) - 1, min(SEARCH_ROWS, len(weights)), device=weights.device).long()
    mine = weights[index]
    energy = float((geometry.value[index] - mine).square().sum())
    some = geometry.rows(index, energy)
    if energy <= 0 or target >= 1.0:
        return 0.0

    def excess(lean: float) -> float:
        taken = (feed(some, mine, factors, lean) >= 0.5).float()
        return 1.0 - float((some.gain() * taken).sum()) / energy - target

    low, above = 0.0, excess(0.0)
    if above <= CLOSE:
        return 0.0
    high, below = 0.0, 0.0  # nothing known yet
    lean = 0.6 * above
    for _ in range(SEARCHES):
        found = excess(lean)
        if abs(found) <= CLOSE:
            break
        if found > 0:
            low, above = lean, found
        else:
            high, below = lean, found
        lean = low + (high - low) * above / (above - below) if high else 2.0 * lean
    return lean


def start_from(geometry: FlipGeometry, weights: Tensor, gram: Tensor, target: float, generator: torch.Generator) -> Tensor:
    """Rounding variables of a layer from the Gram matrix of its inputs: f32 `[rows, columns]` in [0, 1]."""
    factors = factors_of(gram, generator)
    return feed(geometry, weights, factors, lean_for(geometry, weights, factors, target))
