"""What a rounding defense is: given the flips that a grid offers, choose which to take.

The planner walks a tensor in slices of whole rows (some 100,000 weights, so that everything stays in cache), lists
the slice's `Flips` with the grid, and lets the defense choose. A defense that balances over a whole tensor first *surveys* every
slice; the planner then hands each slice its share of the decision. A defense has nothing to do with files.
"""

import importlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from qguard_edge.defenses.options import DefenseOptions
from quant_grids import Flips, Grid, Outcome

Options = TypeVar("Options", bound=DefenseOptions)


@dataclass(frozen=True)
class SliceKey:
    """Which slice of which tensor: it selects the slice's stream of random numbers.

    Attributes:
        seed: of the conversion.
        tensor: name.
        index: number of the slice within the tensor. Slices do not depend on the number of threads.
        row: of the tensor at which the slice begins.
    """

    seed: int
    tensor: str
    index: int
    row: int = 0

    def _generator(self) -> np.random.Generator:
        # SFC64 is numpy's fastest generator; unpredictability comes from the seed being drawn after the attacker published.
        entropy = (self.seed, zlib.crc32(self.tensor.encode()), self.index)
        return np.random.Generator(np.random.SFC64(np.random.SeedSequence(entropy)))

    def normal(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Standard normal f32 numbers, the same on every device."""
        return torch.from_numpy(self._generator().standard_normal(tuple(shape), dtype=np.float32)).to(device)

    def jitter(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Uniform f32 numbers in [-0.5, 0.5) in steps of 2**-16, the same on every device."""
        whole = np.iinfo(np.int16)
        raw = self._generator().integers(whole.min, whole.max, size=int(np.prod(shape)), dtype=np.int16, endpoint=True)
        numbers = torch.from_numpy(raw).to(device).float()
        return numbers.mul_(2.0**-16).view(*shape)

    def uniform(self, device: torch.device) -> Callable[[int, int], Tensor]:
        """A stream of uniform f32 numbers in (0, 1), asked for by their shape; the same on every device."""
        generator = self._generator()

        def draw(rows: int, columns: int) -> Tensor:
            raw = generator.integers(0, 1 << 16, size=(rows, columns), dtype=np.uint16)
            return torch.from_numpy(raw.view(np.int16)).to(device).float().mul_(2.0**-16).add_(0.5 + 2.0**-17)

        return draw


@dataclass(frozen=True)
class JoinedKey:
    """Several slices of a tensor that are rounded as one: each row has the random numbers that it has in its own slice.

    Attributes:
        keys: of the slices, in order.
        rows: of each.
    """

    keys: tuple[SliceKey, ...]
    rows: tuple[int, ...]

    @property
    def row(self) -> int:
        """Of the tensor at which the first slice begins."""
        return self.keys[0].row

    def uniform(self, device: torch.device) -> Callable[[int, int], Tensor]:
        """See `SliceKey.uniform`; the rows of the matrix are the last dimension."""
        streams = [key.uniform(device) for key in self.keys]

        def draw(count: int, rows: int) -> Tensor:
            assert rows == sum(self.rows)
            return torch.cat([stream(count, mine) for stream, mine in zip(streams, self.rows, strict=True)], dim=1)

        return draw


@dataclass(frozen=True)
class Rounded:
    """A slice of rows with chosen codes.

    Attributes:
        blocks: uint8 `[n_blocks, type_size]`.
        outcome: what the change did.
        bits: entropy of the random choices.
    """

    blocks: Tensor
    outcome: Outcome
    bits: float


class MatrixRule(ABC):
    """A rule settled for one matrix; used from several threads."""

    draws = False  # whether another key gives other codes, for any rows that `round` is given

    @abstractmethod
    def round(self, blocks: Tensor, weights: Tensor, key: SliceKey | JoinedKey) -> Rounded:
        """Choose the codes of a slice of rows.

        Args:
            blocks: uint8 `[n_blocks, type_size]`, plain; not modified.
            weights: f32 `[rows, columns]`, full precision; not modified.
            key: selects the random numbers.
        """


class Inputs(Protocol):
    """What is known of the inputs of matrices; `qguard_edge.runtimes.grams.Grams` is one."""

    @property
    def names(self) -> Collection[str]:
        """The matrices whose inputs were seen."""

    def of(self, tensor: str, expert: int | None = None) -> Tensor:
        """Mean of `x x^T` over a matrix's inputs, f32 `[columns, columns]`; of one expert where there are several."""

    def shares(self, tensor: str) -> tuple[str, ...]:
        """All matrices that have the same inputs as this one."""


class Defense(ABC, Generic[Options]):
    """A rule that chooses flips. Subclasses are listed in `qguard_edge.defenses.options`.

    A defense may instead *move* the full-precision weights and leave the rounding to the unmodified quantizer, as some
    papers do: then `requantizes` is true, `move` is called in place of `choose`, and scales are fitted anew.
    """

    surveys = False  # whether `survey` must see every slice before `choose` is called
    requantizes = False  # whether the defense moves weights instead of choosing flips
    wants_inputs = False  # whether each matrix is rounded by `fit`, which knows its inputs, in place of `choose`

    def __init__(self, options: Options) -> None:
        self.options = options

    def on(self, grid: Grid) -> "Defense[Any]":
        """The rule with the settings that fit a format; the default has the same for all."""
        return self

    def survey(self, flips: Flips, key: SliceKey) -> Any:
        """What the decision needs of one slice; only called when `surveys` is true."""
        raise NotImplementedError

    def settle(self, surveys: Sequence[Any]) -> Sequence[Any]:
        """From all slices' surveys, in order, what each slice's `choose` is given as `share`."""
        raise NotImplementedError

    @abstractmethod
    def choose(self, flips: Flips, key: SliceKey, share: Any = None) -> Tensor:
        """Choose flips.

        Args:
            flips: of one slice of rows; not modified.
            key: selects the random numbers.
            share: this slice's part of what `settle` returned.

        Returns:
            f32 of the shape of `flips.ratio`: 1 where the flip is taken, else 0.
        """

    def factor(self, grid: Grid, gram: Tensor | None, columns: int, device: torch.device) -> Any:
        """What `fit` needs of a Gram matrix, for all matrices that share these inputs; only called with `wants_inputs`.

        Args:
            grid: of the matrix's format; only how many weights share a code may matter.
            gram: f32 `[columns, columns]`, mean of `x x^T`; None: nobody saw the inputs.
            columns: of the matrix.
            device: where the arithmetic runs.
        """
        raise NotImplementedError

    def fit(self, grid: Grid, factor: Any, blocks: Tensor, weights: Tensor, key: SliceKey) -> MatrixRule:
        """The rule for one matrix, settled on a sample of its rows; only called with `wants_inputs`.

        Args:
            grid: of the matrix's format.
            factor: what `factor` returned.
            blocks: uint8 `[n_blocks, type_size]`, plain, the rows of the sample.
            weights: f32 `[rows, columns]`, full precision.
            key: selects the random numbers.
        """
        raise NotImplementedError

    def move(self, weights: Tensor, plain: Tensor, half_width: float, key: SliceKey) -> Tensor:
        """Weights that the unmodified quantizer is to round; only called when `requantizes` is true.

        Args:
            weights: f32 `[rows, columns]`, full precision; not modified.
            plain: f32 `[rows, columns]`, what plain quantization made of them.
            half_width: half the median distance of two levels in this tensor, in units of a weight.
            key: selects the random numbers.
        """
        raise NotImplementedError


def make_defense(options: DefenseOptions) -> Defense[Any]:
    """The defense that a set of options belongs to.

    Raises:
        UnsupportedError: an option is outside its limits.
    """
    options.check()
    module, _, name = options.implementation.partition(":")
    defense: Defense[Any] = getattr(importlib.import_module(module), name)(options)
    return defense
