"""The two things a family lists: tensors (`Part`) and metadata (`Setting`), with short ways to write them down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import torch

from convert.hf.transforms import SAME, Shape, Transform


@dataclass(frozen=True)
class Part:
    """One GGUF tensor and where it comes from.

    Attributes:
        sources: Checkpoint tensor names, in the order the transform wants them.
        shape: Shape every source must have, by the configuration.
        transform: How the sources become the GGUF tensor.
        name: Name of the checkpoint tensor that `gguf.TensorNameMap` is asked about; the first source by
            default.
        optional: The checkpoint may lack it (then all sources must be missing).
        data: For a tensor that is computed rather than read: its float32 value (`sources` is empty, and
            `name` is the GGUF name itself).
    """

    sources: tuple[str, ...]
    shape: Shape
    transform: Transform = SAME
    name: str = ""
    optional: bool = False
    data: torch.Tensor | None = None

    @property
    def mapped_name(self) -> str:
        """The name to look up in the tensor name map."""
        return self.name or self.sources[0]


@dataclass(frozen=True)
class Setting:
    """One metadata entry of the architecture, without the architecture's prefix.

    Attributes:
        key: Such as `attention.head_count`.
        value: Its value.
        kind: GGUF's value type; for a list, the type of its elements is derived by the writer.
    """

    key: str
    value: Any
    kind: gguf.GGUFValueType


def count(key: str, value: int) -> Setting:
    """An unsigned 32-bit setting."""
    return Setting(key, value, gguf.GGUFValueType.UINT32)


def number(key: str, value: float) -> Setting:
    """A float32 setting."""
    return Setting(key, value, gguf.GGUFValueType.FLOAT32)


def computed(name: str, data: torch.Tensor) -> Part:
    """A tensor that is not in the checkpoint, under its GGUF name; float32."""
    return Part((), tuple(data.shape), name=name, data=data)


def linear(module: str, rows: int, columns: int, *, bias: bool = False, transform: Transform = SAME) -> Iterator[Part]:
    """The parts of a linear layer: `[rows, columns]` weight and, if asked, `[rows]` bias, moved the same way."""
    yield Part((f"{module}.weight",), (rows, columns), transform)
    if bias:
        yield Part((f"{module}.bias",), (rows,), transform)


def norm(module: str, width: int, *, bias: bool = False, transform: Transform = SAME) -> Iterator[Part]:
    """The parts of a normalisation layer."""
    yield Part((f"{module}.weight",), (width,), transform)
    if bias:
        yield Part((f"{module}.bias",), (width,))
