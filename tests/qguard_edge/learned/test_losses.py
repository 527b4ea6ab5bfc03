"""The terms of the losses against values worked out by hand, and a derivative against finite differences."""

import math

import pytest
import torch

from qguard_edge.learned.losses import SMALLEST_H, kl_divergence, reversal_slope


def test_kl_of_two_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    by_hand = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(by_hand, rel=1e-5)
    # Logits are defined up to a constant, and the order matters.
    assert float(kl_divergence(p.log() + 3, q.log() - 2)) == pytest.approx(by_hand, rel=1e-5)
    assert float(kl_divergence(q.log(), p.log())) != pytest.approx(by_hand, rel=1e-2)


def test_the_reversals_slope_is_a_derivative() -> None:
    generator = torch.Generator().manual_seed(1)
    h = torch.rand(4, 8, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    ratio = torch.rand(4, 8, generator=generator, dtype=torch.float64) * 0.5
    mask = ratio > 0.3
    slope = reversal_slope(h, ratio, mask)

    def reversal(x: torch.Tensor) -> float:
        return float((ratio * -x.log())[mask].sum())

    for i, j in ((0, 0), (1, 5), (3, 7), tuple(mask.nonzero()[0].tolist())):
        step = torch.zeros_like(h)
        step[i, j] = 1e-6
        numeric = (reversal(h + step) - reversal(h - step)) / 2e-6
        assert float(slope[i, j]) == pytest.approx(numeric, rel=1e-4, abs=1e-9)


def test_the_reversals_slope_is_cut_off_but_not_lost() -> None:
    one, mask = torch.tensor([0.4]), torch.tensor([True])
    assert float(reversal_slope(torch.tensor([0.0]), one, mask)) == pytest.approx(-0.4 / SMALLEST_H)
