"""Error feedback on lattices: the constraint, the nearest point by least squares, and entropy by counting."""

import numpy as np
import pytest
import torch

from qguard_edge.defenses.feedback import Feedback, Tuning
from qguard_edge.defenses.feedback_groups import groups_of, lean_of_groups, run_groups
from qguard_edge.defenses.feedback_pass import DAMPING, factor_of
from qguard_edge.defenses.options import FeedbackOptions
from tests.helpers.feedback_layers import CPU, KEY, entropy_of, lattice_layer, lattice_of, output_error


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_lattices_compute_better_what_they_should_under_the_constraint(name: str) -> None:
    grid = lattice_of(name)
    blocks, weights, gram = lattice_layer(name, 96, 512)
    defense = Feedback(FeedbackOptions(alignment=0.0, width=0.5))
    rule = defense.fit(grid, defense.factor(grid, gram, 512, CPU), blocks, weights, KEY)
    made = rule.round(blocks, weights, KEY)
    plain, ours = (grid.dequantize(b).view(weights.shape) - weights for b in (blocks, made.blocks))
    assert output_error(ours, gram) < 0.8 * output_error(plain, gram)
    assert made.outcome.alignment == pytest.approx(0.0, abs=0.03)
    assert made.outcome.projection == pytest.approx(float((plain * ours).sum()), abs=1e-3 * made.outcome.energy)
    assert made.outcome.new_energy == pytest.approx(float(ours.square().sum()), rel=1e-4)
    assert made.outcome.n_changed == grid.changed_codes(blocks, made.blocks)[0]
    assert not bool(((made.blocks ^ blocks) & ~grid.code_mask).any())
    assert made.bits > 0
    assert torch.equal(made.blocks, rule.round(blocks, weights, KEY).blocks)


def test_a_group_takes_the_point_that_costs_the_output_least() -> None:
    """No other point that was looked at is nearer, by least squares over all columns to come, in f64."""
    name, rows, columns, lean = "IQ3_S", 2, 256, 0.1
    grid = lattice_of(name)
    blocks, weights, gram = lattice_layer(name, rows, columns)
    order = Tuning().order_of(gram, 8)
    factor = factor_of(gram, order)
    groups = groups_of(grid, blocks, weights, order)
    passed = run_groups(grid, groups, factor, shift=lean_of_groups(groups, factor) * lean)
    matrix = gram.double().numpy() + DAMPING * float(gram.diagonal().double().mean()) * np.eye(columns)
    matrix = matrix[np.ix_(order.numpy(), order.numpy())]
    error, plain = passed.error.double().numpy(), groups.error.double().numpy()
    for start in range(0, columns, 8):
        inverse = np.linalg.inv(matrix[start:, start:])
        metric = np.linalg.inv(inverse[:8, :8])
        for row in range(rows):
            pull = matrix[start:, :start] @ error[row, :start] + lean * plain[row, start:]
            ideal = -(inverse @ pull)[:8]

            def cost(found: np.ndarray, ideal: np.ndarray = ideal, metric: np.ndarray = metric) -> float:
                return float((found - ideal) @ metric @ (found - ideal))

            taken = cost(error[row, start : start + 8])
            scale = groups.scale[row, start // 8]
            target = (groups.weights[row, start : start + 8] + torch.from_numpy(ideal).float()) / scale
            index, mark = grid.nearest(target.view(1, 8), None)
            nearest = (grid.vectors(index, mark)[0] * scale - groups.weights[row, start : start + 8]).double().numpy()
            assert taken <= cost(nearest) * 1.001 + 1e-12
            assert taken <= cost(plain[row, start : start + 8]) * 1.001 + 1e-12


def test_lattice_bits_are_the_entropy_of_the_whole_row() -> None:
    copies = 20_000
    grid = lattice_of("IQ3_S")
    blocks, weights, gram = lattice_layer("IQ3_S", 1, 256)
    defense = Feedback(FeedbackOptions(alignment=1.0, width=0.25))
    rule = defense.fit(grid, defense.factor(grid, gram, 256, CPU), blocks, weights, KEY)
    made = rule.round(blocks.repeat(copies, 1), weights.repeat(copies, 1), KEY)
    entropy = entropy_of(made.blocks)
    assert 1.0 < entropy < 9.0
    assert made.bits / copies == pytest.approx(entropy, rel=0.05)
