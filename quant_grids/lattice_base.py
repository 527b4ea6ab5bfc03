"""What the lattice formats share: eight weights have one code, a flip moves them together. The bytes are in `lattice`.

    weight = scale * point * sign                IQ2, IQ3: the code book holds magnitudes, one sign bit per weight
    weight = scale * (point + shift)             IQ1: points of -1, 0, 1; shift = +-1/8

In the XXS and XS formats seven sign bits are stored per eight weights; the eighth makes the number of minus signs even.

What a flip is here
-------------------
A **group** is eight neighbouring weights. In units of the scale they are stored as the vector `p` and should be at `u`; the
error is the vector `e = p - u`. A **move** takes the group to another point `p'`, with any signs that the format allows.
With `m = p' - p` and the scale `s` it has

    gain = -s^2 <m, e>     cost = s^2 (<m, m> + 2 <m, e>)     ratio = gain / (cost + 2*gain) = -<m, e> / <m, m>

just what `quant_grids.base` has for a single weight, where `m` is one number.

Which of the thousands of points is worth a move? At a threshold `r` on the ratio, the one with the largest
`gain - r*s^2*<m, m>`. That is the point nearest to `u - strength * e`, with `strength = 1/(2r) - 1`: **the weights reflected
a little to the other side of where they should be, quantized again** (with lambda for the strength this is QVec,
arXiv 2606.20254). So each group offers a few *stages*, the nearest points for rising strengths. Gain and ratio of each stage
are counted from the stage before it. The ratios fall from stage to stage; a defense that takes flips by falling ratio
takes the stages of a group in order, and ends near the best choice for any target. Measured against that choice, out of
all points, for c = 0: 1 to 4% more added error. With one move per group instead it was 20 to 60%, and no single strength
served every target.

A defense with random thresholds may choose a stage without the one before it. `apply` then takes the stage whose total gain
is nearest to the sum of the chosen gains, so the projection stays what the defense counted on, to about one move.

With an importance `h` the same holds for `u - strength/h * e` and distances weighted by `h`; `h` is taken relative to its
mean there, within limits. Gain, cost and ratio are then those of the moves found, with `h` itself.

How the nearest point is found
------------------------------
Round each coordinate to the few values it takes in the book; that is one of 6561 (IQ3: 4096) cells. For each cell the 16
points nearest to its middle are tabulated once; of these the nearest to the target is taken. It almost always is the
nearest of all, for a hundredth of the work. Where the number of minus signs is odd and must be even, the weight nearest
to zero takes the wrong sign, and its coordinate is looked up as the negative number it then is.
"""

import functools
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from gguf import quants
from torch import Tensor

from quant_grids.base import LARGEST_SQUARE, Flips, Grid, Outcome

GROUP = 8  # weights that share a code
GROUPS = 32  # per block of 256
CANDIDATES = 16  # points tabulated per cell
CHUNK = 2048  # targets looked up at a time on a CPU: half a megabyte of candidates stays in cache
IMPORTANCE_SPAN = 8.0  # the search looks at no larger or smaller importance than this, relative to the mean


@dataclass(frozen=True)
class LatticeCodes:
    """Blocks taken apart, by group; `n_groups` is 32 per block.

    Attributes:
        index: int32 `[n_groups, n_points]`, points of the book; with two, each is four weights.
        mark: uint8 `[n_groups]`, bit j set: weight j is negative. IQ1_M: 1 for a negative shift. IQ1_S: 0.
        scale: f32 `[n_groups, 1]`.
        shift: f32 `[n_groups, 1]` where the shift is not a code (IQ1_S), else None.
    """

    index: Tensor
    mark: Tensor
    scale: Tensor
    shift: Tensor | None = None


@dataclass(frozen=True)
class LatticeFlips(Flips):
    """The stages of each group: `ratio` and `gain` are `[rows, groups * stages]`, a group's stages next to each other.

    Attributes:
        total_gain: f32 `[n_groups, stages + 1]`, gain of each stage over the plain codes (stage 0). A stage that offers no
            flip repeats the gain of the one before it, and is never taken.
        total_cost: f32 `[n_groups, stages + 1]`, what it adds to the squared error, without importance.
        index: int32 `[n_groups, stages + 1, n_points]`.
        mark: uint8 `[n_groups, stages + 1]`.
    """

    total_gain: Tensor
    total_cost: Tensor
    index: Tensor
    mark: Tensor


@dataclass(frozen=True)
class CodeBook:
    """The points of a format, and the candidates of each cell (see the module docstring).

    Attributes:
        points: f32 `[n_points, d]`.
        first: smallest coordinate.
        step: from the smallest to the next.
        n_values: how many values a coordinate takes.
        powers: f32 `[d]`, turns a cell's coordinates into its number.
        near: f32 `[n_cells, d, CANDIDATES]`, coordinates of the candidates.
        half_norm: f32 `[n_cells, CANDIDATES]`, half their squared length.
        sums: f32 `[n_cells, CANDIDATES]`, sum of their coordinates.
        candidates: int32 `[n_cells * CANDIDATES]`, their indices.
    """

    points: Tensor
    first: float
    step: float
    n_values: int
    powers: Tensor
    near: Tensor
    half_norm: Tensor
    sums: Tensor
    candidates: Tensor

    def nearest(self, target: Tensor, weight: Tensor | None, tilt: float = 0.0) -> Tensor:
        """The point nearest to each target, among the candidates of its cell.

        Args:
            target: f32 `[n, d]`.
            weight: f32 `[n, d]`, weights of the squared distance, or None.
            tilt: a shift by which all coordinates of the point may be moved, up or down, whichever is nearer.

        Returns:
            int32 `[n]`.
        """
        if len(target) > CHUNK and target.device.type == "cpu":
            parts = [slice(start, start + CHUNK) for start in range(0, len(target), CHUNK)]
            return torch.cat([self.nearest(target[i], None if weight is None else weight[i], tilt) for i in parts])
        digits = ((target - self.first) * (1.0 / self.step)).round_().clamp_(0, self.n_values - 1)
        # A sum, not a matrix product: those may round on a GPU.
        cell = (digits * self.powers).sum(1).int()
        near = self.near.index_select(0, cell)
        # Half the squared distance, up to what all candidates share, with the sign turned.
        if weight is None:
            score = near.mul_(target.unsqueeze(2)).sum(1).sub_(self.half_norm.index_select(0, cell))
            if tilt:
                score += (self.sums.index_select(0, cell) - target.sum(1, keepdim=True)).abs_().mul_(tilt)
        else:
            weighted = near * weight.unsqueeze(2)
            score = (weighted * (target.unsqueeze(2) - 0.5 * near)).sum(1)
            if tilt:
                score += (weighted.sum(1) - (target * weight).sum(1, keepdim=True)).abs_().mul_(tilt)
        return self.candidates.index_select(0, cell * CANDIDATES + score.argmax(1).int())


@functools.cache
def code_book(name: str, device: torch.device) -> CodeBook:
    """The code book of the gguf class `name`, with its candidate tables; about half a second the first time."""
    source = getattr(quants, name)
    source.init_grid()
    points = torch.from_numpy(source.grid.reshape(source.grid_shape).astype(np.float32))
    values = [float(value) for value in source.grid_map]
    dims = points.shape[1]
    cells = torch.cartesian_prod(*[torch.tensor(values)] * dims)
    norm = (points * points).sum(1)
    # All of these are integers below 2^24: the distances are exact, and the same everywhere.
    best = (norm - 2.0 * (cells @ points.T)).topk(CANDIDATES, largest=False).indices
    near = points[best].transpose(1, 2).contiguous()
    return CodeBook(
        points=points.to(device),
        first=values[0],
        step=values[1] - values[0],
        n_values=len(values),
        powers=torch.tensor([float(len(values) ** i) for i in reversed(range(dims))], device=device),
        near=near.to(device),
        half_norm=(0.5 * norm)[best].to(device),
        sums=near.sum(1).to(device),
        candidates=best.int().view(-1).to(device),
    )


class LatticeGrid(Grid, abstract=True):
    """A format of this module. A subclass MUST fill `unpack`, `pack`, `vectors` and `nearest`."""

    kind: ClassVar[str] = "lattice"
    weights_per_code: ClassVar[int] = GROUP
    block_size = 256
    book: ClassVar[str]  # class of gguf.quants that holds the code book
    largest_mark: ClassVar[int]  # all mark bits set
    strengths: ClassVar[tuple[float, ...]] = (0.1, 0.25, 0.5, 1.2)  # of the stages; c = 0 needs 0.2 to 0.4

    @abstractmethod
    def unpack(self, blocks: Tensor) -> LatticeCodes:
        """Take blocks apart: uint8 `[n_blocks, type_size]` -> points, signs, scales."""

    @abstractmethod
    def pack(self, blocks: Tensor, index: Tensor, mark: Tensor) -> Tensor:
        """A copy of `blocks` with the given points and marks; every other bit is kept.

        Args:
            blocks: uint8 `[n_blocks, type_size]`; not modified.
            index: int32 `[n_groups, n_points]`.
            mark: uint8 `[n_groups]`.
        """

    @abstractmethod
    def vectors(self, index: Tensor, mark: Tensor) -> Tensor:
        """The eight weights of each group in units of the scale, f32 `[n_groups, 8]`; without IQ1_S's shift."""

    @abstractmethod
    def nearest(self, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """The nearest point of the lattice.

        Args:
            target: f32 `[n_groups, 8]`, as `vectors` has it.
            weight: f32 `[n_groups, 8]`, weights of the squared distance, or None.

        Returns:
            index and mark, see `LatticeCodes`.
        """

    def points(self, index: Tensor) -> Tensor:
        """Points of the book, f32 `[n_groups, 8]`."""
        book = code_book(self.book, index.device)
        return book.points.index_select(0, index.reshape(-1)).view(-1, GROUP)

    @functools.cached_property
    def code_mask(self) -> Tensor:
        """See `Grid.code_mask`: index and mark bits all set, all clear, and what differs."""
        zero = torch.zeros(1, self.type_size, dtype=torch.uint8)
        codes = self.unpack(zero)
        size = len(code_book(self.book, zero.device).points)
        low = self.pack(zero, torch.zeros_like(codes.index), torch.zeros_like(codes.mark))
        high = self.pack(zero, torch.full_like(codes.index, size - 1), torch.full_like(codes.mark, self.largest_mark))
        return (low ^ high)[0]

    def dequantize(self, blocks: Tensor) -> Tensor:
        """See `Grid.dequantize`. All products have at most 24 bits, so they are exact in any order."""
        self.check_blocks(blocks)
        codes = self.unpack(blocks)
        vectors = self.vectors(codes.index, codes.mark)
        if codes.shift is not None:
            vectors += codes.shift
        return vectors.mul_(codes.scale).view(len(blocks), self.block_size)

    def steps(self, blocks: Tensor) -> Tensor:
        """See `Grid.steps`: the scale of each group times the median gap between the values that coordinates take."""
        codes = self.unpack(blocks)
        gaps = self.vectors(codes.index, codes.mark).unique().diff()
        return codes.scale.abs() * (gaps.median() if gaps.numel() else 0.0)

    def flips(self, blocks: Tensor, weights: Tensor, importance: Tensor | None = None) -> LatticeFlips:
        """See `Grid.flips`. Groups with a weight, or a scale, that is not finite or too small to divide by offer none."""
        codes = self.unpack(blocks)
        vector = self.vectors(codes.index, codes.mark)
        error, square = self._error(codes, vector, weights)
        stages = _Stages(vector, error, importance, weights)
        index, mark = [codes.index], [codes.mark]
        for strength in self.strengths:
            new_index, new_mark = self.nearest(stages.target(strength), stages.relative)
            stages.add(self.vectors(new_index, new_mark))
            index.append(new_index)
            mark.append(new_mark)
        rows = len(weights)
        total_gain = torch.stack(stages.gain, dim=1).mul_(square)
        return LatticeFlips(
            ratio=torch.stack(stages.ratio, dim=1).view(rows, -1),
            gain=(total_gain[:, 1:] - total_gain[:, :-1]).view(rows, -1),
            energy=(error * error).sum(1).mul_(square.view(-1)).view(rows, -1, self.block_size // GROUP).sum(-1),
            total_gain=total_gain,
            total_cost=torch.stack(stages.cost, dim=1).mul_(square),
            index=torch.stack(index, dim=1),
            mark=torch.stack(mark, dim=1),
        )

    def _error(self, codes: LatticeCodes, vector: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Error of each weight in units of the scale, f32 `[n_groups, 8]`, and the squared scale; 0 where unusable."""
        inverse, square = 1.0 / codes.scale, codes.scale * codes.scale
        position = weights.reshape(-1, GROUP) * inverse
        if codes.shift is not None:
            position -= codes.shift
        error = vector - position
        energy = (error * error).sum(1, keepdim=True) * square
        if not bool(torch.isfinite(energy.sum())):
            usable = energy < LARGEST_SQUARE
            error = torch.where(usable, error, 0.0)
            square = torch.where(usable, square, 0.0)
        return error, square

    def apply(self, blocks: Tensor, flips: Flips, chosen: Tensor) -> tuple[Tensor, Outcome]:
        """See `Grid.apply`; a group takes the stage whose total gain is nearest to the sum of its chosen gains."""
        assert isinstance(flips, LatticeFlips)
        asked = (chosen * flips.gain).view(-1, len(self.strengths)).sum(1, keepdim=True)
        stage = (flips.total_gain - asked).abs_().argmin(1, keepdim=True)  # of equals, the first
        mark = flips.mark.gather(1, stage).view(-1)
        places = stage.unsqueeze(2).expand(-1, 1, flips.index.shape[2])
        index = flips.index.gather(1, places).squeeze(1)
        gain = flips.total_gain.gather(1, stage)
        energy = float(flips.energy.double().sum())
        outcome = Outcome(
            n_changed=int(torch.count_nonzero(gain)),
            energy=energy,
            projection=energy - float(gain.double().sum()),
            new_energy=energy + float(flips.total_cost.gather(1, stage).double().sum()),
        )
        return self.pack(blocks, index, mark), outcome

    def changed_codes(self, before: Tensor, after: Tensor) -> tuple[int, int]:
        """See `Grid.changed_codes`; a code is a group of eight weights, and every change counts as one step."""
        old, new = self.unpack(before), self.unpack(after)
        changed = (old.index != new.index).any(1) | (old.mark != new.mark)
        count = int(torch.count_nonzero(changed))
        return count, int(count > 0)


class _Stages:
    """Collects the stages of `LatticeGrid.flips`; all lists start with the plain codes.

    Attributes:
        relative: f32 `[n_groups, 8]`, importance relative to its mean, within limits, for the search; or None.
        gain: per stage f32 `[n_groups]`, gain over the plain codes in units of the squared scale.
        cost: per stage f32 `[n_groups]`, added squared error likewise.
        ratio: per stage after the first, f32 `[n_groups]`, see `Flips.ratio`.
    """

    def __init__(self, vector: Tensor, error: Tensor, importance: Tensor | None, weights: Tensor) -> None:
        self.vector, self.error = vector, error
        self.importance: Tensor | None = None
        self.relative: Tensor | None = None
        if importance is not None:
            self.importance = importance.expand_as(weights).reshape(-1, GROUP)
            scaled = self.importance / importance.mean().clamp_(min=1e-30)
            self.relative = scaled.clamp_(1.0 / IMPORTANCE_SPAN, IMPORTANCE_SPAN)
        zero = torch.zeros(len(vector), device=vector.device)
        self.gain, self.cost, self.ratio = [zero], [zero], list[Tensor]()
        self._bottom, self._ceiling = zero, zero + 1.0

    def target(self, strength: float) -> Tensor:
        """Where to look for the stage of a strength; unimportant weights are reflected further."""
        reach = 1.0 + strength if self.relative is None else 1.0 + strength / self.relative
        return self.vector - reach * self.error

    def add(self, vector: Tensor) -> None:
        """Add a stage. Where it gains nothing over the one before, it repeats that one's gain and offers no flip."""
        move = vector - self.vector
        gain = (move * self.error).sum(1).neg_()
        norm = (move * move).sum(1)
        self.cost.append(norm - 2.0 * gain)
        bottom = norm
        if self.importance is not None:
            bottom = (move * self.importance * (move + 2.0 * self.error)).sum(1) + 2.0 * gain
        more_gain = (gain - self.gain[-1]).clamp_(min=0.0)
        taken = more_gain.sign()  # 1 or 0
        more_bottom = bottom - self._bottom
        ratio = torch.minimum(more_gain / more_bottom.clamp(min=1e-12), self._ceiling)
        self.ratio.append(ratio)
        self.gain.append(torch.maximum(gain, self.gain[-1]))
        self._bottom = self._bottom + more_bottom * taken
        self._ceiling = self._ceiling + (ratio - self._ceiling) * taken


class SignedGrid(LatticeGrid, abstract=True):
    """IQ2 and IQ3: the book holds magnitudes; the mark is one sign bit per weight."""

    even: ClassVar[bool]  # the number of minus signs must be even; seven bits are stored

    def vectors(self, index: Tensor, mark: Tensor) -> Tensor:
        """See `LatticeGrid.vectors`."""
        return self.points(index).mul_(_sign_vectors(mark.device).index_select(0, mark.int()))

    def nearest(self, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `LatticeGrid.nearest`."""
        # The sign bit of a float, moved down, is -1 or 0.
        negative = (target.view(torch.int32) >> 31).float()
        mark = (negative @ _bit_values(target.device)).to(torch.uint8)
        magnitude = target.abs()
        if self.even:
            odd = _odd_table(target.device).index_select(0, mark.int())
            price = magnitude if weight is None else magnitude * weight
            smallest = price.argmin(1, keepdim=True)
            mark = mark ^ (odd << smallest.view(-1).to(torch.uint8))
            turned = magnitude.gather(1, smallest) * (1.0 - 2.0 * odd.float()).unsqueeze(1)
            magnitude.scatter_(1, smallest, turned)
        book = code_book(self.book, target.device)
        dims = book.points.shape[1]
        found = book.nearest(magnitude.view(-1, dims), None if weight is None else weight.view(-1, dims))
        return found.view(len(target), -1), mark


class ShiftGrid(LatticeGrid, abstract=True):
    """IQ1: points of -1, 0, 1, moved up or down by 1/8."""

    book = "IQ1_S"
    strengths = (0.1, 0.3, 1.0)  # a fourth would save 0 to 3% of the added error, for a third more time
    delta: ClassVar[float] = float(quants.IQ1_S.delta)


@functools.cache
def _odd_table(device: torch.device) -> Tensor:
    """uint8 `[256]`: 1 where a byte has an odd number of bits set."""
    return torch.tensor([byte.bit_count() & 1 for byte in range(256)], dtype=torch.uint8, device=device)


@functools.cache
def _bit_values(device: torch.device) -> Tensor:
    """f32 `[8]`: -1, -2, -4, ... -128."""
    return torch.tensor([-float(1 << i) for i in range(8)], device=device)


@functools.cache
def _sign_vectors(device: torch.device) -> Tensor:
    """f32 `[256, 8]`: -1 where the bit is set, else 1."""
    return torch.tensor([[-1.0 if byte >> i & 1 else 1.0 for i in range(8)] for byte in range(256)], device=device)
