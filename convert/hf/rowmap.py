"""Which rows of a base GGUF hold which rows of a torch model, found by comparing the rows themselves.

A calibrated defense measures a torch model and changes a GGUF. In between, rows of q and k have been reordered, q, k
and v fused or left apart, experts stacked, GPT-2's matrices transposed. Instead of keeping those rules twice, this
module looks at the bytes: a row of a GGUF tensor came from the parameter that has the same row.

The search itself is in `convert.hf.rowsearch`; this module is what it finds, and how to carry values across.

What cannot be matched is reported: norms that were folded (Gemma's `1 + w`) or biases that were reordered, for
example. A parameter counts as mapped only if *all* its rows are somewhere in the GGUF.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from convert.hf.checkpoint import Checkpoint
from quant_grids.errors import FormatError

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowSource:
    """Rows of one GGUF tensor that come from one parameter.

    Attributes:
        parameter: The parameter's name.
        transposed: The rows are columns of the parameter: of its last two dimensions swapped, then flattened.
        tensor_rows: Rows of the GGUF tensor, all outer dimensions flattened, ascending.
        parameter_rows: For each, the row of the parameter (flattened in the same way).
    """

    parameter: str
    transposed: bool
    tensor_rows: IntArray
    parameter_rows: IntArray


@dataclass(frozen=True)
class TensorRows:
    """Where the rows of a GGUF tensor come from.

    Attributes:
        tensor: Its name.
        rows: Number of its rows.
        sources: One entry per parameter; their `tensor_rows` are disjoint.
    """

    tensor: str
    rows: int
    sources: tuple[RowSource, ...]

    @property
    def complete(self) -> bool:
        """Whether every row has a source."""
        return sum(len(source.tensor_rows) for source in self.sources) == self.rows

    def gather(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Brings values laid out like the parameters (weights, gradients, ...) into the layout of the GGUF tensor.

        Args:
            parameters: Values by parameter name, each of its parameter's shape.

        Returns:
            [rows, columns], in the type and on the device of the first source's values.

        Raises:
            FormatError: Some rows have no source.
        """
        if not self.complete:
            raise FormatError(f"Tensor {self.tensor} has rows that no parameter holds.")
        views = [as_rows(parameters[source.parameter], source.transposed) for source in self.sources]
        result = views[0].new_empty((self.rows, views[0].shape[1]))
        for source, view in zip(self.sources, views, strict=True):
            chosen = view[torch.from_numpy(source.parameter_rows).to(view.device)]
            result[torch.from_numpy(source.tensor_rows).to(result.device)] = chosen.to(result.device, result.dtype)
        return result

    def scatter(self, values: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> None:
        """Writes rows of the GGUF tensor back into the parameters they come from, in place.

        Args:
            values: [rows, columns] in the GGUF tensor's layout.
            parameters: Destinations by parameter name; those that hold rows of this tensor are modified.
        """
        for source in self.sources:
            target = parameters[source.parameter]
            if source.transposed:
                target = target.transpose(-1, -2)
            flat = torch.from_numpy(source.parameter_rows)
            rows = values[torch.from_numpy(source.tensor_rows).to(values.device)].to(target.device, target.dtype)
            # A transposed stack cannot be flattened without copying, so its outer indices are spelled out.
            outer = torch.unravel_index(flat.to(target.device), target.shape[:-1])
            target[tuple(outer)] = rows


@dataclass(frozen=True)
class Unmapped:
    """Something without a counterpart.

    Attributes:
        name: Parameter or GGUF tensor.
        rows: Number of its rows.
        found: How many of them have a counterpart.
    """

    name: str
    rows: int
    found: int


@dataclass(frozen=True)
class RowMap:
    """The correspondence between a torch model and a base GGUF.

    Attributes:
        tensors: For each GGUF tensor with any match, where its rows come from.
        unmapped_parameters: Parameters with rows that are nowhere in the GGUF.
        unmapped_tensors: GGUF tensors with rows that are in no parameter.
    """

    tensors: Mapping[str, TensorRows]
    unmapped_parameters: tuple[Unmapped, ...]
    unmapped_tensors: tuple[Unmapped, ...]

    def of_parameter(self, name: str) -> list[tuple[str, RowSource]]:
        """GGUF tensors that hold rows of a parameter, with the rows."""
        return [
            (tensor.tensor, source)
            for tensor in self.tensors.values()
            for source in tensor.sources
            if source.parameter == name
        ]


class FolderParameters(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint as a mapping that reads each one when it is asked for, and keeps none.

    Args:
        checkpoint: The weights.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._checkpoint.tensors:
            raise KeyError(name)
        return self._checkpoint.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)


def as_rows(values: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """A parameter as a list of rows: `[..., columns]` -> `[rows, columns]`; one dimension is one row.

    Args:
        values: The parameter, or values of its shape.
        transposed: Swap the last two dimensions first.
    """
    if transposed:
        values = values.transpose(-1, -2)
    return values.reshape(-1, values.shape[-1]) if values.ndim > 0 else values.reshape(1, 1)
