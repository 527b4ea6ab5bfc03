"""The alignment constraint and the two kinds of rounding variables."""

from dataclasses import replace

import pytest
import torch

from qguard_edge.learned.constraint import alignment_of, complete, kept
from qguard_edge.learned.parts import FlipGeometry
from qguard_edge.learned.variables import LAST_START, Relaxed, SignSteps


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


def test_nothing_is_added_where_learning_already_meets_the_target() -> None:
    one = geometry()
    position = one.ratio.clone()
    position[:, :128] = 0.9
    taken = (position >= 0.5) & (one.delta != 0)
    assert alignment_of(taken, one) < 0.6
    assert torch.equal(complete(position, one, 0.6), taken)
    assert torch.equal(complete(one.ratio, one, 1.0), torch.zeros_like(taken))  # no constraint, nothing learned


def test_an_unreachable_target_takes_every_flip() -> None:
    one = geometry()
    chosen = complete(one.ratio * 0.1, FlipGeometry(one.value, one.delta, one.ratio, one.energy * 100), 0.0)
    assert (chosen == (one.delta != 0)).float().mean() > 0.99


def drawn(share: float = 0.0) -> FlipGeometry:
    """As after error feedback: pulls of both signs, `share` of plain rounding's error left before any flip."""
    one = geometry()
    generator = torch.Generator().manual_seed(1)
    pull = one.delta * torch.randn(one.delta.shape, generator=generator) * 0.05
    return replace(one, pull=pull, projection=share * one.energy)


@pytest.mark.parametrize(("share", "target"), [(-0.1, 0.0), (0.0, 0.0), (0.05, 0.0), (-0.3, 0.5)])
def test_flips_that_would_break_the_constraint_are_given_up_the_weakest_first(share: float, target: float) -> None:
    one = drawn(share)
    position = torch.rand(one.delta.shape, generator=torch.Generator().manual_seed(2))
    position += 0.3 * (one.gain() < 0)  # learning leans back towards plain rounding
    wanted = (position >= 0.5) & (one.delta != 0)
    plan = kept(position, one, target)
    allowed = max(target, share)
    assert alignment_of(wanted, one) > allowed or target == 0.5
    assert alignment_of(plan, one) <= allowed + 1e-9
    assert not (plan & ~wanted).any()
    given_up = wanted & ~plan
    if target == 0.5:
        assert not given_up.any()
        return
    assert alignment_of(plan, one) > allowed - 1e-3  # no more than needed
    assert bool((one.gain()[given_up] < 0).all())
    assert float(position[given_up].max()) <= float(position[plan & (one.gain() < 0)].min())


def test_sign_steps_move_against_the_slope_and_stay_hard() -> None:
    one = drawn()
    variables = SignSteps(one, target=1.0)
    assert torch.equal(variables.values(), one.value), "the drawn codes come first"
    before = variables.h.clone()
    assert torch.equal(before, one.ratio.clamp(max=LAST_START))
    generator = torch.Generator().manual_seed(4)
    slope = torch.randn(one.delta.shape, generator=generator)
    variables.step(slope.clone(), 0.01)
    moved = variables.h - before
    assert torch.all(moved[one.delta == 0] == 0)
    assert torch.all((moved * slope * one.delta)[one.delta != 0] <= 0)
    assert moved.abs().max() <= 0.01 + 1e-6
    for _ in range(50):
        variables.step(slope.clone(), 0.01)
    variables.settle()
    assert torch.equal(variables.plan, slope * one.delta < 0)
    expected = torch.where(variables.plan, one.value + one.delta, one.value)
    assert torch.equal(variables.values(), expected)


def test_the_relaxed_start_is_full_precision() -> None:
    one = geometry()
    relaxed = Relaxed(one)
    assert torch.allclose(relaxed.values(), one.value + one.ratio * one.delta, atol=2e-4)


def test_adam_steps_are_torchs_own() -> None:
    """Our Adam is written out because parts are stepped one by one; its oracle is torch.optim."""
    one = geometry(rows=4, columns=32)
    relaxed = Relaxed(one)
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
