"""The rows of a parameter that a quantized GGUF tensor holds, with the two values each of their weights may take.

A flip moves a weight from its plain value `v0` by `delta` to the level on the other side of the full-precision weight
`w = v0 + ratio * delta`. With a rounding variable `h` in [0, 1] (0 keeps the plain code, 1 takes the flip) everything that
learned rounding needs follows from these three arrays:

    soft value          v(h) = v0 + h * delta
    gradient            dL/dh = dL/dv * delta
    squared error       (v(h) - w)^2 = (h - ratio)^2 * delta^2
    projection taken    gain = ratio * delta^2        (what the flip takes off <t', t>, see quant_grids.base)

Codes that were *drawn* by error feedback (`--defense quantguard`) are another place to start from: then `v0` is the drawn
value, a flip goes to the level on the other side of `w` from there, and what it takes off `<t', t>`, with `t` the error of
plain rounding, is `-delta * t`: less than nothing where it leads back towards plain rounding.

The GGUF's rows may be reordered, fused or transposed rows of the torch parameter; `convert.hf.rowmap` has the order.
A parameter that is used twice (tied embeddings) has one part, so it is learned once.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from convert.gguf_file import GgufFile, GgufModel, TensorInfo
from convert.hf.rowmap import RowMap, RowSource, TensorRows
from convert.hf.rowsearch import map_rows
from convert.tensor_io import TensorReader, open_reader, row_slices
from quant_grids import GRIDS
from quant_grids.base import LARGEST_SQUARE, ScalarGrid
from quant_grids.errors import UnsupportedError


@dataclass(frozen=True)
class FlipGeometry:
    """What the flips of some rows do, in units of a weight.

    Attributes:
        value: f32 `[rows, columns]`, the value of each weight before any flip (plain, or as drawn), as the file stores it.
        delta: f32 of the same shape, how far the flip moves it; 0 where there is no flip.
        ratio: f32 of the same shape, where the full-precision weight lies between the two: 0 at `value`; 0 without a flip.
        energy: `<t, t>`, squared error of plain rounding over these rows, weights without a flip included.
        pull: f32 of the same shape, what each flip takes off `<t', t>`; None for plain codes, where it follows from the others.
        projection: `<t', t>` without flips; None for plain codes, where it is the energy.
    """

    value: Tensor
    delta: Tensor
    ratio: Tensor
    energy: float
    pull: Tensor | None = None
    projection: float | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "FlipGeometry":
        """The same on another device or in another type."""
        return replace(
            self,
            value=self.value.to(device, dtype),
            delta=self.delta.to(device, dtype),
            ratio=self.ratio.to(device, dtype),
            pull=None if self.pull is None else self.pull.to(device, dtype),
        )

    @property
    def left(self) -> float:
        """`<t', t>` without flips."""
        return self.energy if self.projection is None else self.projection

    def gain(self) -> Tensor:
        """f32, what each flip takes off the projection `<t', t>`."""
        return self.delta.float().square().mul_(self.ratio) if self.pull is None else self.pull.float()


class Matrix(Protocol):
    """A quantized matrix: a tensor of a GGUF, or a matrix of a folder."""

    @property
    def name(self) -> str:
        """Unique in the file."""

    @property
    def rows(self) -> int:
        """All outer dimensions together."""

    @property
    def columns(self) -> int:
        """Length of a row."""


@dataclass(frozen=True)
class MatrixPart:
    """Rows of one quantized matrix that come from one parameter.

    Attributes:
        tensor: the matrix; rows are meant as the file has them.
        rows: int64 `[n]`, rows of the tensor.
        source: where they sit in the parameter.
        read: reads the geometry of these rows, in this order, from the files. It takes three times the memory of the
            weights, so it is not kept when one block is learned at a time.
        grid: name of its format's grid.
    """

    tensor: Matrix
    rows: Tensor
    source: RowSource
    read: Callable[[], FlipGeometry]
    grid: str = ""

    def geometry(self) -> FlipGeometry:
        """Read anew at each call."""
        return self.read()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.rows), self.tensor.columns

    @property
    def n_weights(self) -> int:
        """Weights in this part."""
        return len(self.rows) * self.tensor.columns

    @property
    def name(self) -> str:
        """Unique: tensor and parameter."""
        return f"{self.tensor.name}|{self.source.parameter}"

    def _view(self) -> TensorRows:
        order = np.arange(len(self.rows))
        mine = RowSource(self.source.parameter, self.source.transposed, order, self.source.parameter_rows)
        return TensorRows(self.tensor.name, len(self.rows), (mine,))

    @functools.cached_property
    def _in_order(self) -> bool:
        """Whether the part is the whole parameter, row by row: then nothing has to be looked up."""
        rows = self.source.parameter_rows
        return not self.source.transposed and bool(np.array_equal(rows, np.arange(len(rows))))

    def gather(self, values: Tensor) -> Tensor:
        """`[n, columns]`: these rows of something of the parameter's shape (its gradient); may share its memory."""
        if self._in_order and values.numel() == self.n_weights:
            return values.reshape(self.shape)
        return self._view().gather({self.source.parameter: values})

    def scatter(self, values: Tensor, parameter: Tensor) -> None:
        """Write `[n, columns]` into the parameter, in place."""
        if self._in_order and parameter.numel() == self.n_weights:
            parameter.copy_(values.reshape(parameter.shape))
            return
        self._view().scatter(values, {self.source.parameter: parameter})


@dataclass(frozen=True)
class MatrixParts:
    """All that can be learned, and what cannot.

    Attributes:
        parts: in the order of the file's tensors.
        unmapped: protected matrices with rows that no parameter holds, or that another tensor already claimed.
    """

    parts: tuple[MatrixPart, ...]
    unmapped: tuple[Matrix, ...]

    def by_parameter(self) -> dict[str, list[int]]:
        """Indices into `parts` by parameter name."""
        found: dict[str, list[int]] = {}
        for index, part in enumerate(self.parts):
            found.setdefault(part.source.parameter, []).append(index)
        return found

    @property
    def n_weights(self) -> int:
        """Weights in all parts."""
        return sum(part.n_weights for part in self.parts)


def require_scalar(tensors: Sequence[TensorInfo], defense: str) -> None:
    """Refuse tensors whose codes are shared by several weights.

    Raises:
        UnsupportedError: naming the first of them.
    """
    for tensor in tensors:
        if not isinstance(GRIDS[tensor.ggml_type], ScalarGrid):
            raise UnsupportedError(
                f"--defense {defense} needs one code per weight; {tensor.name!r} is {tensor.ggml_type.name}, whose codes stand "
                "for several weights: choose another type or --defense feedback"
            )


def read_geometry(
    reader: TensorReader, base: TensorInfo, plain: TensorInfo, drawn: Tensor | None = None
) -> tuple[FlipGeometry, Tensor]:
    """The geometry of a whole tensor: its blocks with every flip taken give the other levels.

    Args:
        reader: of the files.
        base: the tensor in full precision.
        plain: the tensor as llama.cpp rounded it.
        drawn: uint8 `[n_blocks, type_size]`, the tensor with other codes to start from; None: the plain ones.

    Returns:
        The geometry, and `<t, t>` and `<t', t>` of each row, f64 `[rows, 2]`.
    """
    grid = GRIDS[plain.ggml_type]
    assert isinstance(grid, ScalarGrid)
    shape, per_row = (plain.rows, plain.columns), plain.columns // grid.block_size
    value, delta, ratio = torch.empty(shape), torch.empty(shape), torch.empty(shape)
    pull = None if drawn is None else torch.empty(shape)
    sums = torch.empty(plain.rows, 2, dtype=torch.float64)
    for piece in row_slices(plain):
        rows = slice(piece.start, piece.stop)
        start = None if drawn is None else drawn[rows.start * per_row : rows.stop * per_row]
        found, sums[rows] = geometry_of(grid, reader.blocks(plain, piece), reader.weights(base, piece), start)
        value[rows], delta[rows], ratio[rows] = found.value, found.delta, found.ratio
        if pull is not None and found.pull is not None:
            pull[rows] = found.pull
    return with_sums(FlipGeometry(value, delta, ratio, 0.0, pull), sums), sums


def with_sums(geometry: FlipGeometry, sums: Tensor) -> FlipGeometry:
    """A geometry with the `<t, t>` and `<t', t>` of its rows, f64 `[rows, 2]`."""
    energy, projection = map(float, sums.sum(0))
    return replace(geometry, energy=energy, projection=None if geometry.pull is None else projection)


def geometry_of(
    grid: ScalarGrid, blocks: Tensor, weights: Tensor, drawn: Tensor | None = None
) -> tuple[FlipGeometry, Tensor]:
    """The geometry of some rows from their blocks.

    Args:
        grid: of the format.
        blocks: uint8 `[n_blocks, type_size]`, the plain blocks.
        weights: f32 `[rows, columns]`, full precision.
        drawn: the blocks with other codes to start from; None: the plain ones.

    Returns:
        The geometry, and `<t, t>` and `<t', t>` of each row, f64 `[rows, 2]`.
    """
    start = blocks if drawn is None else drawn
    flips = grid.flips(start, weights)
    possible = (flips.step != 0).float() * (flips.ratio > 0)
    flipped, _ = grid.apply(start, flips, possible)
    value = grid.dequantize(start).view(weights.shape)
    delta = grid.dequantize(flipped).view(weights.shape) - value
    if drawn is None:
        energy = flips.energy.double().sum(-1)
        pull, sums = None, torch.stack((energy, energy), 1)
    else:
        old, new = (rounding_error(grid, codes, weights) for codes in (blocks, drawn))
        pull = -delta * old
        sums = torch.stack(((old * old).double().sum(-1), (old * new).double().sum(-1)), 1)
    return with_sums(FlipGeometry(value, delta, flips.ratio * possible, 0.0, pull), sums), sums


def rounding_error(grid: ScalarGrid, blocks: Tensor, weights: Tensor) -> Tensor:
    """f32 `[rows, columns]`: what rounding made of the weights, less the weights; 0 where one of them is no number."""
    error = grid.dequantize(blocks).view(weights.shape) - weights
    return error.masked_fill_(~(error.square() < LARGEST_SQUARE), 0.0)


def make_parts(
    base: GgufModel,
    plain: GgufFile,
    tensors: Sequence[TensorInfo],
    parameters: Mapping[str, Tensor],
    drawn: Mapping[str, Tensor] | None = None,
) -> MatrixParts:
    """Find each protected tensor's rows in a torch model.

    Args:
        base: full precision.
        plain: what llama.cpp wrote.
        tensors: of the plain file; scalar grids.
        parameters: of the torch model, by name, each once.
        drawn: uint8 `[n_blocks, type_size]` by tensor, codes to start from; None: the plain ones.
    """
    rows = map_rows(base.path, parameters)
    claimed: dict[str, set[int]] = {}
    parts: list[MatrixPart] = []
    unmapped: list[TensorInfo] = []
    for tensor in tensors:
        sources = _sources(rows, tensor, claimed)
        if sources is None:
            unmapped.append(tensor)
            continue
        for source in sources:
            index = torch.from_numpy(source.tensor_rows)
            wanted = None if len(sources) == 1 else index
            start = drawn[tensor.name] if drawn is not None else None
            read = functools.partial(tensor_geometry, base, plain, tensor, wanted, start)
            parts.append(MatrixPart(tensor, index, source, read, GRIDS[tensor.ggml_type].name))
    return MatrixParts(tuple(parts), tuple(unmapped))


def tensor_geometry(
    base: GgufModel, plain: GgufFile, tensor: TensorInfo, index: Tensor | None = None, drawn: Tensor | None = None
) -> FlipGeometry:
    """The geometry of a tensor, or of some of its rows, in units of the file; `drawn` as in `read_geometry`."""
    with open_reader(plain.path, *(shard.path for shard in base.shards)) as reader:
        geometry, sums = read_geometry(reader, base.tensors[tensor.name], tensor, drawn)
    if index is None:
        return geometry
    pull = None if geometry.pull is None else geometry.pull[index]
    some = FlipGeometry(geometry.value[index], geometry.delta[index], geometry.ratio[index], 0.0, pull)
    return with_sums(some, sums[index])


def _sources(rows: RowMap, tensor: TensorInfo, claimed: dict[str, set[int]]) -> tuple[RowSource, ...] | None:
    """The sources of a tensor, or None if they are incomplete or taken."""
    found = rows.tensors.get(tensor.name)
    if found is None or not found.complete:
        return None
    for source in found.sources:
        if claimed.get(source.parameter) and not claimed[source.parameter].isdisjoint(source.parameter_rows.tolist()):
            return None
    for source in found.sources:
        claimed.setdefault(source.parameter, set()).update(source.parameter_rows.tolist())
    return found.sources
