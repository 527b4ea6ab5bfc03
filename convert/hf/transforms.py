"""How the tensors of a checkpoint become one tensor of a GGUF.

Almost every GGUF tensor is a checkpoint tensor under another name. The exceptions, each a small class here:

* `RopePairs`: llama.cpp's "normal" RoPE rotates neighbouring rows (2i, 2i+1) of a head; transformers rotates
  row i with row i + head_dim/2. The rows of q and k are therefore put in another order, once, at conversion.
* `AddOne`: Gemma stores RMSNorm weights as `w` and multiplies by `1 + w`; llama.cpp multiplies by what is
  stored.
* `Transpose`: GPT-2's Conv1D keeps `[in, out]`; GGUF keeps `[out, in]`.
* `Stack`: one matrix per expert becomes one three-dimensional tensor.
* `HeadsTogether`: attention that stores q, k, v interleaved per head becomes all q, then all k, then all v.

A transform states the shape it makes before any data is read, so that a whole checkpoint can be checked
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Shape = tuple[int, ...]


class Transform(Protocol):
    """Turns the source tensors of one GGUF tensor into it; never modifies its inputs."""

    def shape(self, sources: Sequence[Shape]) -> Shape:
        """Shape of the result for sources of these shapes."""
        ...

    def __call__(self, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result, in the dtype of the sources."""
        ...


@dataclass(frozen=True)
class Same:
    """The tensor as it is."""

    def shape(self, sources: Sequence[Shape]) -> Shape:
        """The source's own shape."""
        return sources[0]

    def __call__(self, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """The source itself."""
        return sources[0]


SAME = Same()
"""The transform of most tensors."""


@dataclass(frozen=True)
class RopePairs:
    """Puts row i next to row i + head_dim/2 inside each head.

    Attributes:
        heads: Number of heads in the rows of the tensor (of key/value heads for k).
    """

    heads: int

    def shape(self, sources: Sequence[Shape]) -> Shape:
        """The source's own shape: only rows move."""
        return sources[0]

    def __call__(self, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """[heads * head_dim, ...] -> the same shape, rows reordered."""
        weight = sources[0]
        halves = weight.reshape(self.heads, 2, -1, *weight.shape[1:])  # (head, half, pair, ...)
        return halves.transpose(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class AddOne:
    """`w` -> `1 + w`, computed in float32 (norm weights are written as F32 anyway)."""

    def shape(self, sources: Sequence[Shape]) -> Shape:
        """The source's own shape."""
        return sources[0]

    def __call__(self, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """float32 result of the source's shape."""
        return sources[0].float() + 1.0


@dataclass(frozen=True)
class Transpose:
    """[in, out] -> [out, in]."""

    def shape(self, sources: Sequence[Shape]) -> Shape:
        """The two dimensions swapped."""
        rows, columns = sources[0]
        return (columns, rows)

    def __call__(self, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """A contiguous copy."""
        return sources[0].t().contiguous()


@dataclass(frozen=True)
class Stack:
    """One tensor per expert -> one tensor with the expert as its outermost dimension."""

    def shape(self, sources: Sequence[Shape]) -> Shape:
        """(experts, rows, columns)."""
        return (len(sources), *sources[0])

    def __call__(self, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """[experts, rows, columns]."""
        return torch.stack(list(sources))


@dataclass(frozen=True)
class HeadsTogether:
    """Rows grouped as (head, q|k|v, head_dim) -> all q rows, then all k rows, then all v rows.

    Attributes:
        heads: Number of attention heads.
    """

    heads: int

    def shape(self, sources: Sequence[Shape]) -> Shape:
        """The source's own shape: only rows move."""
        return sources[0]

    def __call__(self, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """[3 * heads * head_dim, ...] -> the same shape, rows reordered."""
        weight = sources[0]
        return weight.reshape(self.heads, 3, -1, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)
