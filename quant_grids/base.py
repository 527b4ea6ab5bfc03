"""The grid: the points a quantized weight may take, and the flips between them.

The algorithm every defense stands on
-------------------------------------
A weight `w` was rounded to the level `v = scale * levels[code] + offset`. In *level units*, `u = (w - offset) / scale` is
where the weight lies and `e = levels[code] - u` is its error. The **flip** of a weight takes the neighbouring level on the
other side of `w`. With `D` the distance between the two levels and `s` the scale, a flip

* lowers the projection `<t', t>` of the new error on the old one by `gain = s^2 * |e| * D`,
* adds `cost = s^2 * (D^2 - 2*|e|*D)` to the squared error (negative when plain rounding did not take the nearest level),
* and has the normalised error `ratio = |e| / D = gain / (cost + 2*gain)`.

A weight has no flip when its error is zero, when the neighbour lies outside the code range, or when its scale is zero or
not finite. `Flips` holds these numbers for a slice of rows; it is all that a rounding defense needs to see, and formats
whose codes are shared by several weights (`quant_grids.lattice`) give the same numbers for their own moves.

An importance `h` (one number per column, from an importance matrix) weighs the added squared error: the cost becomes
`h * cost` and the ratio follows from it; the gain, a projection, stays unweighted.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quant_grids.errors import FormatError, UnsupportedError
from quant_grids.ggml_type import GgmlType, layout_of

GRIDS: dict[GgmlType, "Grid"] = {}
LARGEST_SQUARE = 1e30  # a squared error beyond this comes from a weight that is not one, and would drown all others


@dataclass(frozen=True)
class Unpacked:
    """Blocks taken apart.

    Attributes:
        codes: uint8 `[n_blocks, block_size]`, index of each weight's level, in ascending order of the levels.
        scale: f32 `[n_blocks, n_sub]`, scale of each sub-block, as the file stores it.
        offset: f32 `[n_blocks, n_sub]` or None where the format has no offset.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None


@dataclass(frozen=True)
class Flips:
    """Every flip that a slice of rows offers, `m` of them per row (one per weight for scalar formats).

    Attributes:
        ratio: f32 `[rows, m]`, normalised error in [0, 1]; 0 where there is no flip. Rises with gain per cost.
        gain: f32 `[rows, m]`, what the flip takes off the projection `<t', t>`; 0 where there is no flip.
        energy: f32 `[rows, blocks]`, the squared error `<t, t>` of each block as plain rounding left it.

    Grids return a subclass that also carries what their `apply` needs; a defense looks at these three only.
    """

    ratio: Tensor
    gain: Tensor
    energy: Tensor


@dataclass(frozen=True)
class ScalarFlips(Flips):
    """The flips of a scalar format: one per weight, to the neighbouring level.

    Attributes:
        step: f32 `[rows, columns]`, signed change of the code; 0 where there is no flip.
        error: f32 `[rows, columns]`, error of plain rounding in level units.
        square: f32 `[n_sub_blocks, 1]`, squared scale; 0 where the scale is not usable.
        codes: uint8 `[n_blocks, block_size]`, the plain codes.
    """

    step: Tensor
    error: Tensor
    square: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Outcome:
    """What changed codes do to a slice of rows: sums over the slice, as Python floats.

    Attributes:
        n_changed: codes that differ from the plain ones.
        energy: `<t, t>`, squared error of plain rounding.
        projection: `<t', t>`.
        new_energy: `<t', t'>`, squared error after the change.
    """

    n_changed: int
    energy: float
    projection: float
    new_energy: float

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(
            self.n_changed + other.n_changed,
            self.energy + other.energy,
            self.projection + other.projection,
            self.new_energy + other.new_energy,
        )

    @classmethod
    def zero(cls) -> "Outcome":
        """Nothing changed, of no weights: what a sum begins with."""
        return cls(0, 0.0, 0.0, 0.0)

    @classmethod
    def sum(cls, outcomes: Iterable["Outcome"]) -> "Outcome":
        """All of them together, added in the order given."""
        return sum(outcomes, start=cls.zero())

    @property
    def alignment(self) -> float:
        """Share of plain rounding's error vector that is left: 1 for plain rounding itself, 0 for orthogonal."""
        return self.projection / self.energy if self.energy > 0 else 1.0

    @property
    def added_error(self) -> float:
        """Relative change of the squared error: 0.2 means a fifth more."""
        return self.new_energy / self.energy - 1.0 if self.energy > 0 else 0.0


class Grid(ABC):
    """A block format. Subclasses declare their byte fields and are registered when they are defined.

    A subclass MUST declare `ggml_type`, `fields` (byte length of each field, in byte order) and `block_size`. The byte
    size of a block is the sum of its fields; a mismatch with gguf's own table is an error at import.
    """

    ggml_type: ClassVar[GgmlType]
    # Of the class; formats outside ggml (`quant_grids.bnb`) set the next four per object, and are not registered.
    fields: Mapping[str, int]
    block_size: int
    type_size: int
    _slices: dict[str, slice]
    kind: ClassVar[str]  # how the type is protected, for people: "scalar" or "lattice"
    weights_per_code: ClassVar[int] = 1  # how many weights a counted code (`Outcome.n_changed`) stands for

    def __init_subclass__(cls, abstract: bool = False) -> None:
        """Check the declared layout and register the format.

        Raises:
            TypeError: the layout contradicts gguf's table, or the type has a grid already.
        """
        if abstract:
            return
        cls.type_size = sum(cls.fields.values())
        expected = layout_of(cls.ggml_type)
        if expected is not None and expected != (cls.block_size, cls.type_size):
            raise TypeError(f"{cls.__name__}: {cls.block_size, cls.type_size} is not gguf's {expected}")
        if cls.ggml_type in GRIDS:
            raise TypeError(f"{cls.__name__}: {cls.ggml_type.name} has a grid already")
        cls._slices = slices_of(cls.fields)
        GRIDS[cls.ggml_type] = cls()

    @property
    def name(self) -> str:
        """The type's name in ggml's spelling, for instance `Q4_K`."""
        return self.ggml_type.name

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return self.type_size * 8 / self.block_size

    @property
    @abstractmethod
    def code_mask(self) -> Tensor:
        """uint8 `[type_size]`: the bits of a block that a flip may change."""

    def field(self, blocks: Tensor, name: str) -> Tensor:
        """The bytes of one field of every block: a view, uint8 `[n_blocks, length]`."""
        return blocks[:, self._slices[name]]

    def half(self, blocks: Tensor, name: str) -> Tensor:
        """A 2-byte field read as little-endian fp16, widened to f32 `[n_blocks, 1]`."""
        return self.field(blocks, name).contiguous().view(torch.float16).float()

    def check_blocks(self, blocks: Tensor) -> None:
        """Refuse anything but uint8 `[n_blocks, type_size]`.

        Raises:
            FormatError: naming what was given and what the format needs.
        """
        if blocks.dtype != torch.uint8 or blocks.ndim != 2 or blocks.shape[1] != self.type_size:
            raise FormatError(
                f"{self.name} needs blocks of uint8 [n, {self.type_size}], not {blocks.dtype} {list(blocks.shape)}"
            )

    @abstractmethod
    def dequantize(self, blocks: Tensor) -> Tensor:
        """The weights that the blocks stand for: f32 `[n_blocks, block_size]`, equal to libggml's bit for bit."""

    @abstractmethod
    def flips(self, blocks: Tensor, weights: Tensor, importance: Tensor | None = None) -> Flips:
        """The flips of a slice of rows.

        Args:
            blocks: uint8 `[rows * blocks_per_row, type_size]`, the plain blocks.
            weights: f32 `[rows, columns]`, full precision.
            importance: f32 `[columns]` or `[rows, columns]`, weights of the squared error that a flip adds.
        """

    @abstractmethod
    def apply(self, blocks: Tensor, flips: Flips, chosen: Tensor) -> tuple[Tensor, Outcome]:
        """Carry out the chosen flips.

        Args:
            blocks: uint8 `[rows * blocks_per_row, type_size]`, the plain blocks; not modified.
            flips: what `flips` returned for these blocks.
            chosen: f32 `[rows, m]`, 1 where the flip is taken, else 0.

        Returns:
            New blocks that differ from `blocks` in code bits only, and what the change did.
        """

    @abstractmethod
    def steps(self, blocks: Tensor) -> Tensor:
        """Typical distance of neighbouring levels, in units of a weight: f32, one number per sub-block or group."""

    def changed_codes(self, before: Tensor, after: Tensor) -> tuple[int, int]:
        """How many codes differ between two versions of the same blocks, and by how many levels at most."""
        raise UnsupportedError(f"{self.name} cannot count changed codes")


class ScalarGrid(Grid, abstract=True):
    """A format with one code per weight; its levels are `levels`, in ascending order.

    A subclass MUST fill `unpack` and `pack` and declare `sub_size` and `levels`.
    """

    kind: ClassVar[str] = "scalar"
    sub_size: int  # weights that share a scale
    levels: ClassVar[tuple[float, ...]]

    @abstractmethod
    def unpack(self, blocks: Tensor) -> Unpacked:
        """Take blocks apart: uint8 `[n_blocks, type_size]` -> codes, scale, offset."""

    @abstractmethod
    def pack(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """A copy of `blocks` with the given codes; every bit that is not a code bit is kept.

        Args:
            blocks: uint8 `[n_blocks, type_size]`; not modified.
            codes: uint8 `[n_blocks, block_size]`, each below the number of levels.
        """

    @functools.cached_property
    def code_mask(self) -> Tensor:
        """Found by packing the lowest and the highest code into the same block and looking at what changed."""
        zero = torch.zeros(1, self.type_size, dtype=torch.uint8)
        low = torch.zeros(1, self.block_size, dtype=torch.uint8)
        masks = [self.pack(zero, low + code) ^ self.pack(zero, low) for code in range(len(self.levels))]
        return functools.reduce(torch.bitwise_or, masks)[0]

    def steps(self, blocks: Tensor) -> Tensor:
        """See `Grid.steps`: the scale times the median gap of the level table."""
        table = self.level_table(blocks.device)
        return self.unpack(blocks).scale.abs() * table.diff().median()

    def level_table(self, device: torch.device) -> Tensor:
        """f32 `[n_levels]`, ascending."""
        return torch.tensor(self.levels, dtype=torch.float32, device=device)

    def levels_of(self, codes: Tensor) -> Tensor:
        """f32 level of each code, same shape."""
        return _look_up(self.level_table(codes.device), codes.int())

    def dequantize(self, blocks: Tensor) -> Tensor:
        """See `Grid.dequantize`; the products are taken in libggml's order: `scale * level`, then the offset."""
        self.check_blocks(blocks)
        parts = self.unpack(blocks)
        values = self.levels_of(parts.codes).view(len(blocks), -1, self.sub_size) * parts.scale.unsqueeze(-1)
        if parts.offset is not None:
            values += parts.offset.unsqueeze(-1)
        return values.view(len(blocks), self.block_size)

    def position(self, parts: Unpacked, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Where the weights lie on the level axis.

        Returns:
            `u = (w - offset) / scale` as f32 `[n_sub_blocks, sub_size]` and `scale^2` as f32 `[n_sub_blocks, 1]`. Sub-blocks
            whose scale or offset is zero, too small to divide by, or not finite have `scale^2 = 0` and `u = 0`.
        """
        scale = parts.scale.reshape(-1, 1)
        inverse = 1.0 / scale
        square = scale * scale
        shift = None if parts.offset is None else parts.offset.reshape(-1, 1) * inverse
        usable = torch.isfinite(inverse) & (square < LARGEST_SQUARE)
        if shift is not None:
            usable &= torch.isfinite(shift)
        if not bool(usable.all()):
            inverse = torch.where(usable, inverse, 0.0)
            square = torch.where(usable, square, 0.0)
            shift = None if shift is None else torch.where(usable, shift, 0.0)
        position = weights.reshape(-1, self.sub_size) * inverse
        if shift is not None:
            position -= shift
        return position, square

    def flips(self, blocks: Tensor, weights: Tensor, importance: Tensor | None = None) -> ScalarFlips:
        """See `Grid.flips`."""
        parts = self.unpack(blocks)
        position, square = self.position(parts, weights)
        error, step, distance = self._neighbours(parts.codes.view(-1, self.sub_size), position)
        dead = square == 0
        if bool(dead.any()):
            error.masked_fill_(dead, 0.0)
            step.masked_fill_(dead, 0.0)
        squared = (error * error).mul_(square)
        if not math.isfinite(float(squared.sum())):
            # Weights that are not finite, or whose square is not.
            broken = ~(squared < LARGEST_SQUARE)
            for part in (squared, error, step):
                part.masked_fill_(broken, 0.0)
        rows = len(weights)
        product = (error * step).neg_()
        if distance is not None:
            product *= distance
        gain = product * square
        if distance is None:
            ratio = product.clamp_(max=1.0)  # D is 1: |e| itself
        else:
            ratio = product.div_((distance * distance).clamp_(min=1e-30)).clamp_(max=1.0)
        if importance is not None:
            ratio = _weighted_ratio(ratio.view(rows, -1), importance)
        return ScalarFlips(
            ratio=ratio.view(rows, -1),
            gain=gain.view(rows, -1),
            energy=squared.view(rows, -1, self.block_size).sum(-1),
            step=step.view(rows, -1),
            error=error.view(rows, -1),
            square=square,
            codes=parts.codes,
        )

    def _neighbours(self, codes: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Error of each code, signed step to the level on the other side of the weight, and the distance of the two.

        Args:
            codes: uint8 `[n_sub_blocks, sub_size]`.
            position: f32 of the same shape, where the weights lie on the level axis; may be overwritten.

        Returns:
            error and step as f32 of the same shape, and the distance in level units, or None where it is 1 throughout.
        """
        levels = self.level_table(codes.device)
        index = codes.int()
        here = _look_up(levels, index)
        error = here - position
        moved = (index - error.sign().int()).clamp_(0, len(self.levels) - 1)
        step = (moved - index).float()
        distance = _look_up(levels, moved).sub_(here).abs_()
        # Two codes for the same level (plus and minus zero) offer nothing.
        step.masked_fill_(distance == 0, 0.0)
        return error, step, distance

    def apply(self, blocks: Tensor, flips: Flips, chosen: Tensor) -> tuple[Tensor, Outcome]:
        """See `Grid.apply`."""
        assert isinstance(flips, ScalarFlips)
        change = (chosen * flips.step).view(flips.codes.shape)
        # Adding -1 to an unsigned byte is adding 255: the sum wraps to the lower code.
        codes = flips.codes + change.to(torch.int8).view(torch.uint8)
        moved = self._level_change(flips.codes, codes, change).view(-1, self.sub_size)
        weighted = moved * flips.square
        cross = float(torch.dot(weighted.view(-1), flips.error.view(-1)))
        added = float(torch.dot(weighted.view(-1), moved.view(-1)))
        energy = float(flips.energy.double().sum())
        count = int(change.abs().sum(dtype=torch.float64))  # every step is one code
        return self.pack(blocks, codes), Outcome(count, energy, energy + cross, energy + 2.0 * cross + added)

    def _level_change(self, before: Tensor, after: Tensor, change: Tensor) -> Tensor:
        """Change of each level, in level units; `change` is the change of each code."""
        return self.levels_of(after) - self.levels_of(before)

    def changed_codes(self, before: Tensor, after: Tensor) -> tuple[int, int]:
        """See `Grid.changed_codes`."""
        first, second = self.unpack(before).codes, self.unpack(after).codes
        # Unsigned bytes throughout: 32-bit integers would take twenty times as long.
        distance = torch.maximum(first, second) - torch.minimum(first, second)
        return int(torch.count_nonzero(distance)), int(distance.max()) if distance.numel() else 0


class UniformGrid(ScalarGrid, abstract=True):
    """A scalar format whose levels are consecutive integers starting at `first_level`: no table look-ups needed."""

    first_level: ClassVar[int]
    n_levels: ClassVar[int]
    lowest_target: ClassVar[int]  # the lowest and the highest level that a flip may reach; default: all of them
    highest_target: ClassVar[int]

    def __init_subclass__(cls, abstract: bool = False) -> None:
        """Derive the level table from `first_level` and `n_levels`, then register."""
        if not abstract:
            cls.levels = tuple(float(cls.first_level + i) for i in range(cls.n_levels))
            cls.lowest_target = getattr(cls, "lowest_target", cls.first_level)
            cls.highest_target = getattr(cls, "highest_target", cls.first_level + cls.n_levels - 1)
        super().__init_subclass__(abstract=abstract)

    def levels_of(self, codes: Tensor) -> Tensor:
        """f32 level of each code: the code itself plus `first_level`."""
        return codes.float().add_(self.first_level) if self.first_level else codes.float()

    def _neighbours(self, codes: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        number = self.levels_of(codes)
        error = torch.sub(number, position, out=position)
        step = torch.sub(number, error.sign()).clamp_(self.lowest_target, self.highest_target).sub_(number)
        if self.highest_target - self.lowest_target + 1 < self.n_levels:
            # A plain code that stands outside the targets is pulled back by the clamp, even away from its weight.
            step *= error * step < 0
        return error, step, None

    def _level_change(self, before: Tensor, after: Tensor, change: Tensor) -> Tensor:
        return change


def slices_of(fields: Mapping[str, int]) -> dict[str, slice]:
    """Where each field lies in a block, from the byte length of each, in byte order."""
    slices, start = {}, 0
    for name, size in fields.items():
        slices[name] = slice(start, start + size)
        start += size
    return slices


def grid_for(ggml_type: GgmlType) -> Grid:
    """The grid of a type.

    Raises:
        UnsupportedError: the type has none.
    """
    grid = GRIDS.get(ggml_type)
    if grid is None:
        raise UnsupportedError(
            f"{ggml_type.name} has no grid, so its rounding cannot be chosen; it would be left as llama.cpp wrote it"
        )
    return grid


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]` for an int32 index of any shape; a flat `index_select` is several times as fast."""
    return table.index_select(0, index.reshape(-1)).view(index.shape)


def _weighted_ratio(ratio: Tensor, importance: Tensor) -> Tensor:
    """`gain / (h*cost + 2*gain)` from the unweighted ratio `r = gain / (cost + 2*gain)`: `r / (h*(1 - 2r) + 2r)`."""
    doubled = 2.0 * ratio
    bottom = (importance * (1.0 - doubled)).add_(doubled)
    return torch.where(ratio > 0, ratio / bottom.clamp_(min=1e-9), 0.0).clamp_(0.0, 1.0)
