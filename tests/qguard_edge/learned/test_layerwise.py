"""EFRAP's objective through Gram matrices, and the block-by-block walk."""

import copy
from typing import Any

import pytest
import torch

from qguard_edge.defenses.options import EfrapOptions, QuantGuardOptions
from qguard_edge.learned.blocks import capture, gram_matrices, numbered_blocks, parts_of_block, rows_of, stream
from qguard_edge.learned.blockwise import BlockScope, efrap_positions
from qguard_edge.learned.layerwise import hard_error, layer_loss, learn_layer
from qguard_edge.learned.parts import FlipGeometry
from qguard_edge.learned.variables import SignSteps
from tests.helpers.learned_setup import Setup

CPU = torch.device("cpu")
Samples = list[tuple[int, ...]]


def layer(rows: int = 32, columns: int = 64) -> tuple[FlipGeometry, torch.Tensor, torch.Tensor]:
    """A layer rounded to whole numbers of 0.1, and correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(rows, columns, generator=generator) * 0.3
    value = (weights / 0.1).round() * 0.1
    delta = 0.1 * (weights - value).sign()
    ratio = (weights - value).abs() / 0.1
    inputs = torch.randn(512, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return FlipGeometry(value, delta, ratio, float((value - weights).square().sum())), weights, inputs


def test_the_gram_matrix_stands_for_the_activations() -> None:
    geometry, weights, inputs = layer()
    error = geometry.value - weights
    by_hand = float((inputs @ error.T).square().sum() / len(inputs))
    assert float(layer_loss(error, inputs.T @ inputs / len(inputs))) == pytest.approx(by_hand, rel=1e-4)
    assert float(layer_loss(error, None)) == pytest.approx(geometry.energy, rel=1e-5)


def test_a_learned_layer_computes_more_exactly_than_nearest_rounding() -> None:
    geometry, weights, inputs = layer()
    gram = inputs.T @ inputs / len(inputs)
    options = EfrapOptions(steps=200, flip=0.0, binarize=1.0)
    position, start, _ = learn_layer(geometry, weights, gram, options)
    assert hard_error(position, geometry, weights, gram) < 0.7 * start
    turned, _, _ = learn_layer(geometry, weights, gram, EfrapOptions(steps=200, flip=10.0))
    largest = geometry.ratio > 0.4
    assert (turned >= 0.5)[largest].float().mean() > (position >= 0.5)[largest].float().mean()


def test_rows_of_text() -> None:
    assert rows_of([(1, 2, 3), (4, 5)], 2, 2).tolist() == [[[1, 2], [3, 4]]]
    assert rows_of([(1, 2, 3)], 100, 8).tolist() == [[[1, 2, 3]]]


def test_walking_the_blocks_is_running_the_model(setup: Setup, samples: Samples) -> None:
    """The stream through all blocks ends where transformers' own forward pass ends, before the last norm."""
    model = setup.loaded.model
    rows = rows_of(samples, 20, 4)
    inputs = capture(setup.loaded, rows)
    states = inputs.states
    for number, block, _ in numbered_blocks(model):
        states = stream(block, states, inputs.arguments[number], CPU)
    with torch.no_grad():
        whole = model.model(input_ids=rows[1], output_hidden_states=True).last_hidden_state
        assert torch.allclose(model.model.norm(states[1]), whole, atol=0.05 * float(whole.abs().max()))


def test_gram_matrices_of_a_real_block(setup: Setup, samples: Samples) -> None:
    rows = rows_of(samples, 20, 4)
    inputs = capture(setup.loaded, rows)
    number, block, prefix = next(numbered_blocks(setup.loaded.model))
    names = [part.source.parameter for _, part in parts_of_block(setup.parts.parts, prefix)]
    assert len(names) == 7
    grams, _ = gram_matrices(block, names, inputs.states, inputs.arguments[number], CPU)
    assert set(grams) == set(names)
    norm: Any = block.input_layernorm
    normed = norm(inputs.states).reshape(-1, 256).detach()
    expected = normed.T @ normed / len(normed)
    assert torch.allclose(grams["self_attn.q_proj.weight"], expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_every_part_gets_a_position_and_the_model_is_left_as_it_was(setup: Setup, samples: Samples) -> None:
    before = copy.deepcopy(setup.loaded.model.state_dict())
    positions, losses = efrap_positions(setup.loaded, setup.parts.parts, samples, EfrapOptions(steps=2), setup.task)
    options = QuantGuardOptions(scope="block", steps=2, batch=4, rate=0.1)
    scope = BlockScope(setup.loaded, setup.drawn_parts, samples, samples[:6], options, setup.task)
    plans = scope.run()
    for found in (positions, plans, scope.wanted):
        assert [tuple(p.shape) for p in found] == [tuple(p.geometry().value.shape) for p in setup.parts.parts]
    assert all(bool(((p >= 0) & (p <= 1)).all()) for p in positions)
    assert len(losses) == len(setup.parts.parts)
    assert len(scope.losses) == 2
    after = setup.loaded.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_learning_a_block_lowers_its_output_error(setup: Setup, samples: Samples) -> None:
    options = QuantGuardOptions(scope="block", steps=40, batch=16, rate=0.01)
    scope = BlockScope(setup.loaded, setup.drawn_parts, samples, samples[:6], options, setup.task)
    plans = scope.run()
    assert all(last < first for first, last in scope.losses)
    for part, plan in zip(setup.drawn_parts, plans, strict=True):
        assert bool(plan.any()) == part.source.parameter.startswith("model.layers."), part.name


def test_a_block_that_gets_worse_keeps_its_draws(setup: Setup, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    step = SignSteps.step
    monkeypatch.setattr(SignSteps, "step", lambda self, slope, rate: step(self, -slope, rate))  # uphill
    options = QuantGuardOptions(scope="block", steps=4, batch=8, rate=0.1)
    scope = BlockScope(setup.loaded, setup.drawn_parts, samples, samples[:6], options, setup.task)
    assert not any(bool(plan.any()) for plan in scope.run())
    assert all(first == last for first, last in scope.losses)
    assert any(bool(plan.any()) for plan in scope.wanted)
