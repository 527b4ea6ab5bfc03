"""Error feedback: checked against its definition, and it keeps what layers compute better than rounding does."""

import torch

from qguard_edge.defenses.options import QuantGuardOptions
from qguard_edge.learned.constraint import alignment_of, complete
from qguard_edge.learned.feedback import Factors, factors_of, feed, lean_for, start_from
from qguard_edge.learned.parts import FlipGeometry
from qguard_edge.learned.starts import plain_start, start_positions
from tests.helpers.learned_setup import Setup

Samples = list[tuple[int, ...]]


def layer(rows: int = 24, columns: int = 160, step: float = 0.3) -> tuple[FlipGeometry, torch.Tensor, torch.Tensor]:
    """A layer on a grid of whole steps, with correlated inputs: geometry, weights, Gram matrix."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(rows, columns, generator=generator)
    value = (weights / step).round() * step
    delta = torch.where(weights > value, step, -step)
    delta[:, 5] = 0.0  # weights without a flip
    ratio = torch.where(delta == 0, 0.0, (weights - value) / torch.where(delta == 0, 1.0, delta))
    inputs = torch.randn(400, 40, generator=generator) @ torch.randn(40, columns, generator=generator)
    return FlipGeometry(value, delta, ratio, float((value - weights).square().sum())), weights, inputs.T @ inputs / 400


def output_error(geometry: FlipGeometry, weights: torch.Tensor, gram: torch.Tensor, taken: torch.Tensor) -> float:
    error = geometry.value + geometry.delta * taken - weights
    return float(((error @ gram) * error).sum())


def by_definition(geometry: FlipGeometry, weights: torch.Tensor, gram: torch.Tensor, factors: Factors) -> torch.Tensor:
    """One row at a time: after each column, the rest is moved to where it makes up best for the error so far."""
    found = torch.zeros_like(weights)
    order = factors.order.tolist()
    damped = gram.double().clone()
    damped.diagonal().add_(0.01 * gram.diagonal().double().mean())
    for row in range(len(weights)):
        error = torch.zeros(len(order), dtype=torch.float64)
        for place, column in enumerate(order):
            rest, done = order[place:], order[:place]
            ideal = weights[row, column].double()
            if done:  # the least output error given the errors already made: H_rr e_r = -H_rd e_d
                ideal += torch.linalg.solve(damped[rest][:, rest], -damped[rest][:, done] @ error[done])[0]
            delta = float(geometry.delta[row, column])
            position = (float(ideal) - float(geometry.value[row, column])) / delta if delta else 0.0
            found[row, column] = min(1.0, max(0.0, position))
            error[column] = geometry.value[row, column] + delta * (position >= 0.5) - weights[row, column]
    return found


def test_a_pass_makes_up_for_the_errors_so_far() -> None:
    geometry, weights, gram = layer(rows=2, columns=30)
    factors = factors_of(gram, torch.Generator().manual_seed(0))
    assert torch.allclose(feed(geometry, weights, factors, 0.0), by_definition(geometry, weights, gram, factors), atol=1e-3)


def test_the_layer_computes_better_what_it_should_and_the_constraint_costs_little() -> None:
    geometry, weights, gram = layer()
    plain = output_error(geometry, weights, gram, torch.zeros_like(weights))
    free = start_from(geometry, weights, gram, 1.0, torch.Generator().manual_seed(0))
    bound = start_from(geometry, weights, gram, 0.1, torch.Generator().manual_seed(0))
    assert output_error(geometry, weights, gram, (free >= 0.5).float()) < 0.5 * plain
    assert output_error(geometry, weights, gram, (bound >= 0.5).float()) < 0.6 * plain
    nearest = complete(geometry.ratio, geometry, 0.1)  # the constraint alone, without looking at the inputs
    assert output_error(geometry, weights, gram, nearest.float()) > plain
    assert bool((bound[:, 5] == 0).all())


def test_the_lean_meets_the_constraint() -> None:
    geometry, weights, gram = layer(rows=64)
    factors = factors_of(gram, torch.Generator().manual_seed(0))
    for target in (0.3, 0.1, 0.0, -0.2):
        lean = lean_for(geometry, weights, factors, target)
        assert abs(alignment_of(feed(geometry, weights, factors, lean) >= 0.5, geometry) - target) < 0.02
    assert lean_for(geometry, weights, factors, 1.0) == 0.0


def test_the_seed_decides_and_two_seeds_differ_as_much_as_orthos(setup: Setup, samples: Samples) -> None:
    parts = setup.parts.parts

    def plans(seed: int, start: str) -> list[torch.Tensor]:
        options = QuantGuardOptions(start=start)
        found = start_positions(setup.loaded, parts, samples, options, setup.again(seed=seed), resident=True)
        return [complete(h, part.geometry(), 0.1) for h, part in zip(found, parts, strict=True)]

    def shared(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
        both = sum(int((a & b).sum()) for a, b in zip(one, other, strict=True))
        return both / sum(int(a.sum()) for a in one)

    first = plans(7, "feedback")
    assert all(map(torch.equal, first, plans(7, "feedback")))
    assert shared(first, plans(8, "feedback")) < shared(plans(7, "ortho"), plans(8, "ortho")) + 0.1
    assert shared(plans(7, "fraction"), plans(8, "fraction")) == 1.0


def test_a_silent_layer_starts_at_the_weights_place() -> None:
    """An expert that no text reached: nothing is known of its inputs."""
    geometry, weights, gram = layer()
    position = start_from(geometry, weights, torch.zeros_like(gram), 1.0, torch.Generator().manual_seed(0))
    assert torch.allclose(position, geometry.ratio, atol=1e-4)


def test_one_block_at_a_time_is_the_same_start(setup: Setup, samples: Samples) -> None:
    parts, options = setup.parts.parts, QuantGuardOptions()
    whole, piecewise = (
        start_positions(setup.loaded, parts, samples, options, setup.task, resident=resident) for resident in (True, False)
    )
    assert all(map(torch.equal, whole, piecewise))
    plain = [plain_start(part, "feedback", setup.task.seed) for part in parts]
    fed = [part.name for part, one, other in zip(parts, whole, plain, strict=True) if not torch.equal(one, other)]
    assert len(fed) == sum(".weight" in name and "embed_tokens" not in name for name in (part.name for part in parts))
