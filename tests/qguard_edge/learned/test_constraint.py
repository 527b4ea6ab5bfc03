"""The alignment constraint and the two kinds of rounding variables."""

import pytest
import torch

from qguard_edge.learned.constraint import alignment_of, complete, threshold_of
from qguard_edge.learned.parts import FlipGeometry
from qguard_edge.learned.variables import Relaxed, SignSteps


def geometry(seed: int = 0, rows: int = 64, columns: int = 256) -> FlipGeometry:
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(rows, columns, generator=generator) * 0.1
    ratio = torch.rand(rows, columns, generator=generator) * 0.5
    delta[:, ::17] = 0.0
    ratio[:, ::17] = 0.0
    value = torch.randn(rows, columns, generator=generator)
    return FlipGeometry(value, delta, ratio, float((delta.double() * ratio.double()).square().sum()))


@pytest.mark.parametrize("target", [0.5, 0.1, 0.0, -0.25])
def test_completion_meets_the_target_exactly_and_takes_the_dearest_variables_first(target: float) -> None:
    one = geometry()
    chosen = complete(one.ratio, one, target)
    assert alignment_of(chosen, one) == pytest.approx(target, abs=1e-3)
    assert not (chosen & (one.delta == 0)).any()
    lowest, highest = one.ratio[chosen].min(), one.ratio[~chosen & (one.delta != 0)].max()
    assert lowest >= highest - 1 / 4096
    threshold = threshold_of(one.ratio, one, target)
    assert alignment_of(one.ratio >= threshold, one) <= target + 1e-6
    assert threshold == pytest.approx(float(lowest), abs=2 / 4096)


def test_nothing_is_added_where_learning_already_meets_the_target() -> None:
    one = geometry()
    position = one.ratio.clone()
    position[:, :128] = 0.9
    taken = (position >= 0.5) & (one.delta != 0)
    assert alignment_of(taken, one) < 0.6
    assert torch.equal(complete(position, one, 0.6), taken)
    assert threshold_of(position, one, 0.6) == 0.5
    assert torch.equal(complete(one.ratio, one, 1.0), torch.zeros_like(taken))  # no constraint, nothing learned


def test_an_unreachable_target_takes_every_flip() -> None:
    one = geometry()
    chosen = complete(one.ratio * 0.1, FlipGeometry(one.value, one.delta, one.ratio, one.energy * 100), 0.0)
    assert (chosen == (one.delta != 0)).float().mean() > 0.99


def test_sign_steps_move_against_the_slope_and_stay_hard() -> None:
    one = geometry()
    variables = SignSteps(one, target=1.0)
    before = variables.h.clone()
    variables.step(one.delta.clone(), 0.01, 0.0)
    moved = variables.h - before
    assert torch.all(moved[one.delta > 0] <= 0)
    assert torch.all(moved[one.delta < 0] > 0)
    assert torch.all(moved[one.delta == 0] == 0)
    values = variables.values()
    assert torch.all((values == one.value) | torch.isclose(values, one.value + one.delta))


def test_the_relaxed_start_is_full_precision() -> None:
    one = geometry()
    relaxed = Relaxed(one, target=1.0)
    assert torch.allclose(relaxed.values(), one.value + one.ratio * one.delta, atol=2e-4)


def test_adam_steps_are_torchs_own() -> None:
    """Our Adam is written out because parts are stepped one by one; its oracle is torch.optim."""
    one = geometry(rows=4, columns=32)
    relaxed = Relaxed(one, target=1.0)
    theirs = relaxed.a.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([theirs], lr=0.02, betas=(0.9, 0.99), eps=1e-12)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        slope = torch.randn(4, 32, generator=generator)
        optimizer.zero_grad()
        h = (theirs.sigmoid() * 1.2 - 0.1).clamp(0, 1)
        (h * slope).sum().backward()
        optimizer.step()
        relaxed.step(slope.clone(), 0.02, 1.0)
    assert torch.allclose(relaxed.a, theirs.detach(), atol=1e-5)
