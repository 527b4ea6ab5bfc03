"""Boxes: for every weight the interval in which llama.cpp still writes the code it writes now.

A box attack repairs a poisoned model without leaving the boxes, so that the repaired model quantizes to the poisoned
one's file. The boxes are read from that file itself: the same `Grid` that the converter patches takes its blocks apart
into codes, scales and offsets, and the parameters of the torch model are found in it by content
(`convert.hf.rowsearch`), whatever the order of the rows. So boxes exist for every scalar type, mixture and fallback,
and nothing here repeats a quantizer.

The weights that set a scale (`quant_grids.cells`) are *frozen*: the quantizer would derive another scale from others.
The k-quants also *search* for scales that fit all weights, so freezing is not proof. `GgufBoxes.tighten` closes the
loop: quantize the repaired model, see which sub-blocks came out otherwise, shrink their boxes, go on.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convert.gguf_file import GgufFile, TensorInfo
from convert.hf.rowmap import RowMap, TensorRows
from convert.hf.rowsearch import map_rows
from convert.tensor_io import FLOAT_TYPES, RowSlice, open_reader
from quant_grids import GRIDS
from quant_grids.base import ScalarGrid, Unpacked
from quant_grids.cells import cell_of, extent, scale_setters
from quant_grids.errors import UnsupportedError

HALF_EPSILON = 2.0**-11


@dataclass(frozen=True)
class BoxRule:
    """How boxes are cut out of the quantization cells. All lengths are shares of the half cell on the same side.

    Attributes:
        kind: `cell`: the whole cell; `error`: from the weight to its dequantized value (Mind the Gap).
        reach: how much of the half cell may be used, 0.998 being code +- 0.499 step. Smaller leaves a margin.
        widen: `error` only: how far the interval is stretched on both sides.
        freeze: hold the weights that set a scale or an offset.
    """

    kind: str
    reach: float = 0.998
    widen: float = 0.0
    freeze: bool = True


@dataclass(frozen=True)
class Box:
    """Bounds of one parameter, each f32 of the parameter's shape; equal where the weight is frozen."""

    low: Tensor
    high: Tensor


def cut_box(grid: ScalarGrid, blocks: Tensor, weights: Tensor, rule: BoxRule) -> Box:
    """Boxes of some rows.

    Args:
        grid: of the reference's type.
        blocks: uint8 `[n_blocks, type_size]`, the reference.
        weights: f32 `[rows, columns]`, what it was quantized from.
        rule: see `BoxRule`.

    Returns:
        Bounds in the layout of `weights`. A weight always lies in its box, also where the quantizer did not take the
        nearest level: there the box reaches from the weight to the cell's near edge.
    """
    parts = grid.unpack(blocks)
    value, low, high = cell_of(grid, parts)
    w = weights.reshape(-1, grid.sub_size)
    # The legacy quantizers choose codes with scales that are rounded to fp16 only when stored: the true edges are this near.
    slack = HALF_EPSILON * (torch.maximum(low.abs(), high.abs()) + _offset_size(parts))
    low, high = value + rule.reach * (low - value) + slack, value + rule.reach * (high - value) - slack
    if rule.kind == "error":
        near = torch.minimum(w, value) + rule.widen * (low - value)
        far = torch.maximum(w, value) + rule.widen * (high - value)
        low, high = torch.maximum(low, near), torch.minimum(high, far)
    if rule.freeze:
        # No weight may become larger than those that set the scale, and those stay.
        smallest, largest = extent(grid, parts, w)
        low, high = torch.maximum(low, smallest), torch.minimum(high, largest)
        frozen = scale_setters(grid, parts, w)
        low, high = torch.where(frozen, w, low), torch.where(frozen, w, high)
    low, high = torch.minimum(low, w), torch.maximum(high, w)
    return Box(low.view_as(weights), high.view_as(weights))


def _offset_size(parts: Unpacked) -> Tensor | float:
    """Twice the magnitude of the offsets, f32 `[n_sub_blocks, 1]`: what their rounding and the scale's add up to."""
    return 0.0 if parts.offset is None else 2.0 * parts.offset.abs().reshape(-1, 1)


@dataclass
class Boxes:
    """The boxes of a whole model.

    Attributes:
        by_parameter: bounds of every parameter that is stored quantized.
    """

    by_parameter: dict[str, Box]

    def project(self, parameters: Mapping[str, Tensor]) -> None:
        """Move every weight of these parameters into its box, in place."""
        with torch.no_grad():
            for name, box in self.by_parameter.items():
                if name in parameters:
                    parameters[name].copy_(torch.minimum(torch.maximum(parameters[name], box.low), box.high))

    def freeze_all_but(self, names: Container[str], parameters: Mapping[str, Tensor]) -> None:
        """Let no parameter move but those of `names`."""
        for name in self.by_parameter:
            if name not in names:
                fixed = parameters[name].detach()
                self.by_parameter[name] = Box(fixed, fixed)

    def intersect(self, other: "Boxes") -> None:
        """Shrink to what both allow; where they do not meet, to the nearest point of this one."""
        for name, box in self.by_parameter.items():
            theirs = other.by_parameter[name]
            low = torch.minimum(torch.maximum(box.low, theirs.low), box.high)
            high = torch.maximum(torch.minimum(box.high, theirs.high), low)
            self.by_parameter[name] = Box(low, high)

    def free_share(self) -> float:
        """Share of the boxed weights that may move at all."""
        boxes = self.by_parameter.values()
        return sum(int((b.high > b.low).sum()) for b in boxes) / sum(b.low.numel() for b in boxes)

    def mean_width(self, name: str) -> float:
        """Mean width of the boxes of one parameter."""
        box = self.by_parameter[name]
        return float((box.high - box.low).mean())


@dataclass
class GgufBoxes(Boxes):
    """Boxes that were read from a file.

    Attributes:
        row_map: which rows of the GGUF hold which rows of the parameters.
        reference: the poisoned file that the repaired model must quantize to.
    """

    row_map: RowMap
    reference: Path

    def tensors_of(self, names: Container[str]) -> set[str]:
        """The tensors of the GGUF that hold rows of these parameters."""
        return {name for name, rows in self.row_map.tensors.items() if any(one.parameter in names for one in rows.sources)}

    def tighten(self, requantized: Path, poisoned: Mapping[str, Tensor], keep: float) -> float:
        """Shrink the boxes of every sub-block that did not come out as in the reference.

        Args:
            requantized: the file that llama.cpp makes of the repaired model.
            poisoned: parameters of the poisoned model; the boxes shrink towards them.
            keep: share of each box's extent that is left; 0 freezes the sub-block at the poisoned weights.

        Returns:
            Share of the weights whose sub-block was preserved.
        """
        same = total = 0
        moved = {name: torch.zeros_like(box.low) for name, box in self.by_parameter.items()}
        for rows, equal in self._compare(requantized):
            same, total = same + int(equal.sum()), total + equal.numel()
            rows.scatter((~equal).float(), moved)
        for name, box in self.by_parameter.items():
            kept, changed = poisoned[name].detach(), moved[name] > 0
            low = torch.where(changed, kept + keep * (box.low - kept), box.low)
            high = torch.where(changed, kept + keep * (box.high - kept), box.high)
            self.by_parameter[name] = Box(low, high)
        return same / total

    def _compare(self, requantized: Path) -> Iterator[tuple[TensorRows, Tensor]]:
        """For each quantized tensor its rows and bool `[rows, columns]`: the weight's sub-block is preserved."""
        before, after = GgufFile(self.reference), GgufFile(requantized)
        with open_reader(self.reference, requantized) as reader:
            for tensor in before.tensors.values():
                if tensor.ggml_type in FLOAT_TYPES:
                    continue
                every = RowSlice(0, 0, tensor.rows)
                a, b = reader.weights(tensor, every), reader.weights(after.tensors[tensor.name], every)
                size = scalar_grid(tensor).sub_size
                equal = (a == b).view(-1, size).all(1).repeat_interleave(size).view(a.shape)
                yield self.row_map.tensors[tensor.name], equal


def make_boxes(base: Path, reference: Path, parameters: Mapping[str, Tensor], rule: BoxRule) -> GgufBoxes:
    """Boxes of a model from the file llama.cpp made of it.

    Args:
        base: full-precision GGUF of the model.
        reference: quantized GGUF of the same.
        parameters: the torch model's, f32.
        rule: see `BoxRule`.

    Raises:
        UnsupportedError: a tensor's type has no scalar grid: its codes are shared by several weights.
    """
    row_map = map_rows(base, dict(parameters))
    # Parameters that no GGUF tensor holds quantized get no box; the repair leaves them alone.
    low = {name: p.detach().clone() for name, p in parameters.items()}
    high = {name: p.detach().clone() for name, p in parameters.items()}
    boxed: set[str] = set()
    file = GgufFile(reference)
    with open_reader(reference) as reader:
        for tensor in file.tensors.values():
            if tensor.ggml_type in FLOAT_TYPES:
                continue
            grid = scalar_grid(tensor)
            rows = row_map.tensors[tensor.name]
            weights = rows.gather(parameters).detach()
            box = cut_box(grid, reader.blocks(tensor, RowSlice(0, 0, tensor.rows)), weights, rule)
            rows.scatter(box.low, low)
            rows.scatter(box.high, high)
            boxed |= {source.parameter for source in rows.sources}
    return GgufBoxes({name: Box(low[name], high[name]) for name in sorted(boxed)}, row_map, reference)


def reference_values(boxes: GgufBoxes, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dequantized values of the reference and cell widths, in the layout of the parameters, f32."""
    values = {name: parameters[name].detach().clone() for name in boxes.by_parameter}
    steps = {name: torch.full_like(value, 1e-12) for name, value in values.items()}
    with open_reader(boxes.reference) as reader:
        for tensor in GgufFile(boxes.reference).tensors.values():
            if tensor.ggml_type in FLOAT_TYPES:
                continue
            grid = scalar_grid(tensor)
            value, low, high = cell_of(grid, grid.unpack(reader.blocks(tensor, RowSlice(0, 0, tensor.rows))))
            rows = boxes.row_map.tensors[tensor.name]
            rows.scatter(value.view(rows.rows, -1), values)
            rows.scatter((high - low).clamp_min(1e-12).view(rows.rows, -1), steps)
    return values, steps


def scalar_grid(tensor: TensorInfo) -> ScalarGrid:
    """The grid of a tensor's type, if it has one code per weight.

    Raises:
        UnsupportedError: it has not.
    """
    grid = GRIDS.get(tensor.ggml_type)
    if not isinstance(grid, ScalarGrid):
        raise UnsupportedError(
            f"{tensor.name!r} is {tensor.ggml_type.name}: its codes are shared by several weights, so it has no boxes; "
            "attack a scalar type such as q4_k, q8_0 or iq4_xs"
        )
    return grid


def preserved_share(reference: Path, requantized: Path, among: Container[str] | None = None) -> float:
    """Share of the quantized weights, of these tensors or of all, whose dequantized value is the same in both files."""
    before, after = GgufFile(reference), GgufFile(requantized)
    same = total = 0
    with open_reader(reference, requantized) as reader:
        for tensor in before.tensors.values():
            if tensor.ggml_type in FLOAT_TYPES or (among is not None and tensor.name not in among):
                continue
            every = RowSlice(0, 0, tensor.rows)
            a, b = reader.weights(tensor, every), reader.weights(after.tensors[tensor.name], every)
            same, total = same + int((a == b).sum()), total + a.numel()
    return same / total
