"""The loop over columns: TorchScript and Python round to the same bit, and both as the formula says."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qguard_edge.defenses import feedback_loop

COLUMNS, ROWS, SUB = 40, 24, 8  # two whole runs and a short one
TABLE = torch.tensor([-1.0, -0.7, -0.2, 0.0, 0.3, 1.0])


class Block:
    """Columns of some random rows, with levels 0 to 7 or those of a table."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        self.sub = [j // SUB for j in range(COLUMNS)]
        self.scale, self.offset = uniform(COLUMNS // SUB, ROWS) * 0.2 + 0.1, uniform(COLUMNS // SUB, ROWS) - 0.8
        self.weights, self.noise = uniform(COLUMNS, ROWS) * 2 - 1, uniform(COLUMNS, ROWS) - 0.5
        self.feed = uniform(COLUMNS, COLUMNS) * 0.3
        self.centre, self.codes, self.error = self.weights.clone(), torch.empty(COLUMNS, ROWS), torch.zeros(COLUMNS, ROWS)
        self.lowest = torch.zeros(COLUMNS, ROWS)

    def rows(self, highest: float) -> tuple[Tensor, ...]:
        """The arguments that have a row per column."""
        high = torch.full((COLUMNS, ROWS), highest)
        return self.centre, self.codes, self.error, self.offset[self.sub] - self.weights, self.lowest, high

    def evenly(self, function: Callable[..., None]) -> tuple[Tensor, ...]:
        """Round to even levels."""
        inverse = 1 / self.scale
        base = (self.offset * inverse)[self.sub].neg_() + self.noise
        function(*self.rows(7.0), base, self.scale, inverse, self.feed, self.sub)
        return self.centre, self.codes, self.error

    def by_table(self, function: Callable[..., None], noise: Tensor | None) -> tuple[Tensor, ...]:
        """Round to the table's levels."""
        rows = self.rows(len(TABLE) - 1.0)
        function(*rows, noise, self.offset, self.scale, 1 / self.scale, self.feed, self.sub, TABLE)
        return self.centre, self.codes, self.error

    def expected(self, codes: Tensor, levels: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Centres and errors that follow from some codes, column by column in f64."""
        centre, error = self.weights.double(), torch.zeros(COLUMNS, ROWS, dtype=torch.float64)
        for j in range(COLUMNS):
            centre[j] -= self.feed[:j, j].double() @ error[:j]
            value = self.scale[self.sub[j]].double() * levels(codes[j]).double() + self.offset[self.sub[j]].double()
            error[j] = value - self.weights[j].double()
        return centre, error


def test_even_levels_are_rounded_as_the_formula_says() -> None:
    centre, codes, error = Block().evenly(feedback_loop.round_evenly)
    fresh = Block()
    wanted_centre, wanted_error = fresh.expected(codes, lambda code: code)
    assert torch.allclose(centre.double(), wanted_centre, atol=1e-5)
    assert torch.allclose(error.double(), wanted_error, atol=1e-6)
    place = (wanted_centre - fresh.offset[fresh.sub]) / fresh.scale[fresh.sub] + fresh.noise
    assert float((codes - place.clamp(0, 7)).abs().max()) < 0.5 + 1e-4


def test_torchscript_and_python_agree_to_the_bit() -> None:
    pairs = [
        (Block().evenly(feedback_loop.round_evenly), Block().evenly(feedback_loop._even)),
        (Block().by_table(feedback_loop.round_by_table, None), Block().by_table(feedback_loop._by_table, None)),
        (
            Block().by_table(feedback_loop.round_by_table, Block().noise),
            Block().by_table(feedback_loop._by_table, Block().noise),
        ),
    ]
    for compiled, plain in pairs:
        for one, other in zip(compiled, plain, strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(pairs[1][0][1], pairs[2][0][1])  # the noise is used


def test_levels_of_a_table_are_rounded_as_the_formula_says() -> None:
    centre, codes, error = Block().by_table(feedback_loop.round_by_table, None)
    fresh = Block()
    wanted_centre, wanted_error = fresh.expected(codes, lambda code: TABLE[code.int()])
    assert torch.allclose(centre.double(), wanted_centre, atol=1e-5)
    assert torch.allclose(error.double(), wanted_error, atol=1e-6)
    level = (wanted_centre - fresh.offset[fresh.sub]) / fresh.scale[fresh.sub]
    nearest = (level.unsqueeze(-1) - TABLE).abs().argmin(-1)
    assert float((codes != nearest).float().mean()) < 0.01  # but for ties


@pytest.mark.parametrize("minor", [13, 14])
def test_without_torchscript_the_functions_are_run_as_they_are(minor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.version_info", (3, minor))
    compiled = feedback_loop._compiled(feedback_loop._even)
    assert (compiled.__name__ == "locked") == (minor == 14)
    for one, other in zip(Block().evenly(compiled), Block().evenly(feedback_loop.round_evenly), strict=True):
        assert torch.equal(one, other)
