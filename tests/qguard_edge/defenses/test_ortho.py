"""Ortho held to its definition: the target, the least added error, and what randomness changes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qguard_edge.defenses.base import SliceKey
from qguard_edge.defenses.options import OrthoOptions
from qguard_edge.defenses.ortho import Ortho
from quant_grids import Flips

KEY = SliceKey(seed=1, tensor="blk.0.ffn_up.weight", index=0)


def uniform_flips(rows: int, columns: int, seed: int = 0, *, scales: bool = False) -> Flips:
    """Flips of weights whose errors are spread evenly over a cell of width 1."""
    generator = torch.Generator().manual_seed(seed)
    ratio = torch.rand(rows, columns, generator=generator) * 0.5
    square = torch.rand(rows, columns, generator=generator) + 0.5 if scales else torch.ones(rows, columns)
    block = 256 if columns % 256 == 0 else columns
    return Flips(ratio=ratio, gain=ratio * square, energy=(ratio**2 * square).view(rows, -1, block).sum(-1))


def effect(flips: Flips, chosen: torch.Tensor) -> tuple[float, float]:
    """Alignment and relative added squared error."""
    energy = float(flips.energy.sum())
    cost = flips.gain / flips.ratio.clamp(min=1e-9) - 2 * flips.gain
    return 1.0 - float((chosen * flips.gain).sum()) / energy, float((chosen * cost).sum()) / energy


@pytest.mark.parametrize("group", ["row", "block", "tensor"])
@pytest.mark.parametrize("target", [0.9, 0.5, 0.0, -0.3])
@pytest.mark.parametrize("width", [0.0, 0.1, 0.5, 1.0])
def test_target_is_met(group: str, target: float, width: float) -> None:
    flips = uniform_flips(64, 512, scales=True)
    alignment, _ = effect(flips, choose(flips, OrthoOptions(group=group, target=target, width=width)))
    assert alignment == pytest.approx(target, abs=0.005)


def choose(flips: Flips, options: OrthoOptions, key: SliceKey = KEY) -> torch.Tensor:
    rule = Ortho(options)
    if not rule.surveys:
        return rule.choose(flips, key)
    (share,) = rule.settle([rule.survey(flips, key)])
    return rule.choose(flips, key, share)


def test_closed_form_for_evenly_spread_errors() -> None:
    """c = 0 flips about 17% of the weights and adds about 20% squared error (18.4% and 20.3% by integration)."""
    flips = uniform_flips(256, 1024)
    chosen = choose(flips, OrthoOptions(width=0.0))
    assert float(chosen.mean()) == pytest.approx(1 - np.sqrt(1 / 4 - 1 / 12) * 2, abs=0.003)
    threshold = np.sqrt(1 / 4 - 1 / 12)
    added = 12 * (2 * (0.5 - threshold) - 2 * (0.25 - threshold**2))
    assert effect(flips, chosen)[1] == pytest.approx(added, abs=0.005)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 11), st.sampled_from([0.7, 0.3, 0.0]))
def test_no_choice_of_flips_is_cheaper(seed: int, count: int, target: float) -> None:
    """Brute force over all choices that remove at least as much: greedy pays at most one flip more than the cheapest."""
    flips = uniform_flips(1, count, seed)
    chosen = choose(flips, OrthoOptions(target=target, width=0.0))[0].numpy()
    gain, ratio = flips.gain[0].double().numpy(), flips.ratio[0].double().numpy()
    cost = gain / np.maximum(ratio, 1e-9) - 2 * gain
    removed, paid = float((chosen * gain).sum()), float((chosen * cost).sum())
    every = np.array(list(itertools.product((0.0, 1.0), repeat=count)))
    enough = every @ gain >= removed - 1e-9
    cheapest = float((every[enough] @ cost).min())
    # Bins are 1/128 wide: within one, order is not by cost.
    assert paid <= cheapest + cost.max() * 0.5 + 1e-6


def test_unreachable_target_takes_every_flip() -> None:
    flips = Flips(torch.full((2, 4), 0.1), torch.full((2, 4), 0.1), torch.full((2, 1), 100.0))
    for group in ("row", "block", "tensor"):
        assert choose(flips, OrthoOptions(group=group, width=0.0)).sum() == 8


def test_nothing_to_do() -> None:
    zero = Flips(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 1))
    for group in ("row", "block", "tensor"):
        assert choose(zero, OrthoOptions(group=group, width=0.0)).sum() == 0
    assert choose(uniform_flips(2, 64), OrthoOptions(target=1.0)).sum() == 0


def test_pile_up_at_one_error_is_cut_exactly() -> None:
    """An attacked tensor may have every error at the edge of its box: one bin holds everything and must be split."""
    flips = Flips(torch.full((8, 512), 0.45), torch.full((8, 512), 0.45), torch.full((8, 1), 512 * 0.45**2))
    for group in ("row", "block", "tensor"):
        alignment, _ = effect(flips, choose(flips, OrthoOptions(group=group, width=0.0)))
        assert alignment == pytest.approx(0.0, abs=0.005)


def test_width_zero_is_predictable_and_width_is_not() -> None:
    flips = uniform_flips(16, 1024)
    keys = [SliceKey(seed, KEY.tensor, 0) for seed in (1, 2)]
    greedy = [choose(flips, OrthoOptions(width=0.0), key) for key in keys]
    assert torch.equal(*greedy)
    soft = [choose(flips, OrthoOptions(width=0.3), key) for key in keys]
    assert not torch.equal(*soft)
    assert torch.equal(soft[0], choose(flips, OrthoOptions(width=0.3), keys[0]))


def test_width_costs_error_and_share_rises_with_the_error() -> None:
    flips = uniform_flips(256, 1024)
    added = [effect(flips, choose(flips, OrthoOptions(width=width)))[1] for width in (0.0, 0.2, 0.5)]
    assert added == sorted(added)
    chosen = choose(flips, OrthoOptions(width=0.3))
    shares = [float(chosen[(flips.ratio >= low) & (flips.ratio < low + 0.05)].mean()) for low in np.arange(0.2, 0.5, 0.05)]
    assert all(a <= b + 0.01 for a, b in itertools.pairwise(shares))
    assert shares[0] < 0.15
    assert shares[-1] > 0.6


@pytest.mark.parametrize(("width", "common"), [(0.5, 0.33), (0.75, 0.15), (1.0, 0.0)])
def test_only_the_widest_threshold_has_no_common_part(width: float, common: float) -> None:
    """The mean error over the seeds, as a share of the old error: what an attacker who knows the rule can aim at."""
    flips = uniform_flips(64, 1024)
    seeds = 200
    share = sum(choose(flips, OrthoOptions(width=width), SliceKey(seed, KEY.tensor, 0)) for seed in range(seeds)) / seeds
    # Weights of like errors together: the rest of one weight's own mean is noise of its 200 draws.
    order = flips.ratio.view(-1).argsort()
    mean = (flips.ratio - share).view(-1)[order].view(256, -1).mean(1)
    assert float(mean.square().mean().sqrt()) / float(flips.ratio.square().mean().sqrt()) == pytest.approx(common, abs=0.02)


def test_the_price_of_randomness() -> None:
    flips = uniform_flips(256, 1024)
    added = [effect(flips, choose(flips, OrthoOptions(width=width)))[1] for width in (0.0, 0.5, 1.0)]
    assert added == pytest.approx([0.203, 0.56, 1.0], abs=0.02)


def test_jitter_is_uniform_and_differs_by_slice() -> None:
    jitter = KEY.jitter((1000, 1000), torch.device("cpu"))
    assert float(jitter.min()) >= -0.5
    assert float(jitter.max()) < 0.5
    assert float(jitter.mean()) == pytest.approx(0.0, abs=2e-3)
    assert float(jitter.var()) == pytest.approx(1 / 12, abs=1e-3)
    assert not torch.equal(jitter[:1], SliceKey(1, KEY.tensor, 1).jitter((1, 1000), torch.device("cpu")))
