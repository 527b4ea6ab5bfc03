"""Taking flips from the top: the one selection that ortho and FlipGuard share.

Every flip has a score in [0, 1) and an additive amount (the gain it brings, the error it adds, or 1 to count). Within each
group, flips are taken in falling order of score until the amounts add up to a limit. No sorting: scores fall into bins, a
histogram of amounts gives the bin in which the limit is reached, and the flips of that bin are taken in storage order while they
fit. Exact to half a flip.
"""

import torch
from torch import Tensor


def bins_of(score: Tensor, count: int) -> Tensor:
    """Whole f32 numbers 0..count-1 for scores in [0, 1); scores outside are clamped. Overwrites `score`."""
    return score.mul_(float(count)).clamp_(0, count - 1).floor_()


def histogram_of(bins: Tensor, amount: Tensor, count: int) -> Tensor:
    """Amount per bin of each group: `[groups, n]` -> `[groups, count]`."""
    groups = len(bins)
    # Every group has a histogram of its own: shift group g's bins to g * count.
    offsets = torch.arange(0, groups * count, count, dtype=torch.int32, device=bins.device).view(-1, 1)
    index = bins.int().add_(offsets).view(-1)
    return torch.bincount(index, amount.reshape(-1), groups * count).view(groups, count)


def boundary_of(histogram: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The bin at which the amounts, collected from the top, reach the limit.

    Args:
        histogram: `[groups, bins]`, amount per bin.
        limit: `[groups]`.

    Returns:
        `[groups]` bin index (-1: all bins together are not enough) and `[groups]` amount still missing above it.
    """
    collected = histogram.flip(-1).cumsum(-1).flip(-1)  # amount of this bin and all above
    boundary = (collected >= limit.unsqueeze(-1)).sum(-1).sub_(1)
    above = torch.cat((collected, torch.zeros_like(collected[:, :1])), dim=-1)
    rest = limit - above.gather(-1, (boundary + 1).unsqueeze(-1)).squeeze(-1)
    return boundary.to(limit.dtype), rest


def take(bins: Tensor, amount: Tensor, boundary: Tensor, rest: Tensor) -> Tensor:
    """1.0 for flips above the boundary bin, and for those in it, in storage order, until `rest` is met to half a flip.

    All masks are floats made by clamping whole numbers: torch's comparisons are five times slower than its arithmetic.

    Args:
        bins: `[groups, n]` from `bins_of`.
        amount: `[groups, n]`.
        boundary: `[groups, 1]`.
        rest: `[groups, 1]`.
    """
    distance = bins - boundary
    above = distance.clamp(0.0, 1.0)
    inside = distance.abs_().clamp_(max=1.0).neg_().add_(1.0)
    amounts = amount * inside
    # A flip in the boundary bin is taken while more than half of its amount is still missing when its turn comes.
    missing = amounts.mul(0.5).sub_(amounts.cumsum(-1)).add_(rest)
    return missing.sign_().clamp_(min=0.0).mul_(inside).add_(above)


def take_from_top(bins: Tensor, amount: Tensor, limit: Tensor, count: int) -> Tensor:
    """`take` with the boundary found per group: the whole selection in one call.

    Args:
        bins: `[groups, n]` from `bins_of(score, count)`.
        amount: `[groups, n]`.
        limit: `[groups]`.
        count: number of bins.
    """
    boundary, rest = boundary_of(histogram_of(bins, amount, count), limit)
    return take(bins, amount, boundary.view(-1, 1), rest.view(-1, 1))
