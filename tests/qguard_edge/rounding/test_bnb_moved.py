"""Weights moved so that bitsandbytes itself rounds them to the planned codes, for one format and for all three at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from qguard_edge.defenses.base import SliceKey, make_defense
from qguard_edge.defenses.options import (
    DefenseOptions,
    FlipGuardOptions,
    NoiseOptions,
    NoneOptions,
    OrthoOptions,
    QVecOptions,
)
from qguard_edge.rounding.bnb_moved import Moved, _held, move_weights

ALL = ("nf4", "fp4", "int8")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEFENSES = [OrthoOptions(), OrthoOptions(group="tensor"), FlipGuardOptions(), QVecOptions(), NoiseOptions()]


def matrix(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    weights = 0.03 * torch.randn(shape, generator=generator)
    weights[0] *= 30  # an outlier row
    weights[1] = 0
    return weights.to(dtype)


def move(weights: Tensor, kinds: tuple[str, ...], options: DefenseOptions, seed: int = 1) -> Moved:
    with ThreadPoolExecutor(2) as pool:
        key = lambda kind, index: SliceKey(seed, f"x {kind}", index)  # noqa: E731
        return move_weights(weights, kinds, make_defense(options), key=key, pool=pool, check=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 128), (50, 96), (40, 33)])
@pytest.mark.parametrize("options", DEFENSES, ids=lambda options: options.label)
def test_bitsandbytes_agrees(shape: tuple[int, int], dtype: torch.dtype, options: DefenseOptions) -> None:
    weights = matrix(shape, dtype)
    for kinds in (("nf4",), ("fp4",), ("int8",), ALL):
        moved = move(weights, kinds, options)
        assert moved.weights.dtype == dtype
        assert moved.weights.shape == weights.shape
        assert {plan.kind for plan in moved.plans} == set(kinds)
        assert moved.n_moved > 0
        for plan in moved.plans:
            assert plan.reproduced is not None
            assert plan.reproduced >= 0.999 * weights.numel(), (kinds, plan)
            assert plan.outcome.n_changed > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_defense_nothing_moves(dtype: torch.dtype) -> None:
    weights = matrix((64, 96), dtype)
    moved = move(weights, ALL, NoneOptions())
    assert torch.equal(moved.weights, weights)
    assert moved.n_moved == 0
    for plan in moved.plans:
        assert plan.reproduced == weights.numel()
        assert (plan.given_up, plan.outcome.n_changed) == (0, 0)


@pytest.mark.parametrize("kind", ALL)
def test_one_format_meets_the_target_of_ortho_and_moves_what_it_flips(kind: str) -> None:
    weights = 0.03 * torch.randn(128, 256, generator=torch.Generator().manual_seed(8))
    moved = move(weights, (kind,), OrthoOptions())
    (plan,) = moved.plans
    assert abs(plan.outcome.alignment) < 0.01
    assert plan.outcome.n_changed == moved.n_moved
    assert plan.given_up == 0


def test_formats_that_do_not_meet_give_up_flips_and_say_so() -> None:
    weights = 0.03 * torch.randn(128, 256, generator=torch.Generator().manual_seed(8))
    by_kind = {plan.kind: plan for plan in move(weights, ALL, OrthoOptions()).plans}
    assert by_kind["fp4"].given_up == 0  # first in line
    assert 0 < by_kind["nf4"].given_up < by_kind["int8"].given_up < weights.numel() / 2


def test_same_seed_same_weights() -> None:
    weights = matrix((64, 128), torch.bfloat16)
    first, again, other = (move(weights, ALL, OrthoOptions(), seed).weights for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ends_are_the_outermost_numbers_that_the_dtype_holds(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    centre = torch.randn(4000, generator=generator) * 10.0 ** torch.randint(-6, 3, (4000,), generator=generator)
    centre[:3] = torch.tensor([0.0, 1e-7, -1e-7])
    half = centre.abs() * torch.rand(4000, generator=generator) * 0.01
    low, high = _held(centre - half, centre + half, dtype)
    there = low <= high
    assert 0.2 < float(there.float().mean()) < 1
    assert torch.equal(low, low.to(dtype).float())
    assert torch.equal(high, high.to(dtype).float())
    assert bool((low >= centre - half).all())
    assert bool((high <= centre + half).all())
    # Where nothing is left, the nearest number lies outside indeed.
    near = centre.to(dtype).float()
    assert not bool(((near >= centre - half) & (near <= centre + half))[~there].any())
