"""The terms of the loss against values worked out by hand, and their derivatives against finite differences."""

import math
from collections.abc import Callable

import pytest
import torch

from qguard_edge.learned.losses import (
    SMALLEST_H,
    distance,
    distance_slope,
    kl_divergence,
    reversal,
    reversal_mask,
    reversal_slope,
)
from qguard_edge.learned.parts import FlipGeometry


def test_kl_of_two_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    by_hand = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(by_hand, rel=1e-5)
    # Logits are defined up to a constant, and the order matters.
    assert float(kl_divergence(p.log() + 3, q.log() - 2)) == pytest.approx(by_hand, rel=1e-5)
    assert float(kl_divergence(q.log(), p.log())) != pytest.approx(by_hand, rel=1e-2)


def test_reversal_by_hand() -> None:
    ratio = torch.tensor([0.1, 0.4, 0.2, 0.0, 0.5, 0.3])
    mask = reversal_mask(ratio, 1 / 3)
    assert mask.tolist() == [False, True, False, False, True, False]
    h = torch.tensor([0.9, 0.5, 0.9, 0.9, 0.25, 0.9])
    assert float(reversal(h, ratio, mask)) == pytest.approx(0.4 * math.log(2) + 0.5 * math.log(4), rel=1e-5)
    assert not reversal_mask(ratio, 0.0).any()
    assert reversal_mask(ratio, 1.0).sum() == 5  # a weight without a flip is never asked to turn


def test_distance_by_hand() -> None:
    geometry = FlipGeometry(torch.zeros(1, 2), torch.tensor([[2.0, -1.0]]), torch.tensor([[0.25, 0.5]]), 0.5**2 + 0.5**2)
    assert float(distance(torch.zeros(1, 2), geometry)) == pytest.approx(1.0)  # plain rounding
    assert float(distance(geometry.ratio, geometry)) == 0.0  # full precision
    assert float(distance(torch.tensor([[1.0, 0.0]]), geometry)) == pytest.approx((1.5**2 + 0.5**2) / 0.5)


def test_slopes_are_the_derivatives() -> None:
    generator = torch.Generator().manual_seed(1)
    h = torch.rand(4, 8, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    ratio = torch.rand(4, 8, generator=generator, dtype=torch.float64) * 0.5
    delta = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    geometry = FlipGeometry(torch.zeros_like(delta), delta, ratio, 3.0)
    mask = reversal_mask(ratio, 0.3)
    losses: list[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = [
        (lambda x: reversal(x, ratio, mask), reversal_slope(h, ratio, mask)),
        (lambda x: distance(x, geometry), distance_slope(h, geometry)),
    ]
    for value, slope in losses:
        for i, j in ((0, 0), (1, 5), (3, 7)):
            step = torch.zeros_like(h)
            step[i, j] = 1e-6
            numeric = (float(value(h + step)) - float(value(h - step))) / 2e-6
            assert float(slope[i, j]) == pytest.approx(numeric, rel=1e-4, abs=1e-9)


def test_the_reversals_slope_is_cut_off_but_not_lost() -> None:
    one, mask = torch.tensor([0.4]), torch.tensor([True])
    assert float(reversal_slope(torch.tensor([0.0]), one, mask)) == pytest.approx(-0.4 / SMALLEST_H)
