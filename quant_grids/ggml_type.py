"""Storage types by number, including those that llama.cpp has and the installed gguf package does not know yet.

gguf's enum lags behind `enum ggml_type` in `ggml.h`. A type that is missing there is listed here with its block layout, and
`type_of` and `layout_of` look in both. Members of both enums are integers: they compare and hash by number, so tables such
as `GRIDS` take either, and the day gguf learns a type, its own member takes over without a change here.
"""

from enum import IntEnum
from typing import TypeAlias

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quant_grids.errors import FormatError


class NewerType(IntEnum):
    """Types of llama.cpp that a gguf release has yet to learn."""

    Q2_0 = 42


GgmlType: TypeAlias = GGMLQuantizationType | NewerType

# (weights per block, bytes per block), as `static_assert`ed in ggml-common.h.
NEWER_SIZES: dict[NewerType, tuple[int, int]] = {NewerType.Q2_0: (64, 18)}


def type_of(number: int) -> GgmlType:
    """The storage type with a number: gguf's member where gguf knows it.

    Raises:
        FormatError: neither list has the number.
    """
    for known in (GGMLQuantizationType, NewerType):
        try:
            return known(number)
        except ValueError:
            continue
    raise FormatError(f"{number} is not a ggml storage type known to this version")


def type_named(name: str) -> GgmlType:
    """The storage type of a name, any case.

    Raises:
        FormatError: no type has it; the message lists those that do.
    """
    for kind in (GGMLQuantizationType, NewerType):
        if name.upper() in kind.__members__:
            return type_of(int(kind[name.upper()]))
    known = ", ".join(member.name.lower() for kind in (GGMLQuantizationType, NewerType) for member in kind)
    raise FormatError(f"{name!r} is not a ggml type; choose one of {known}")


def layout_of(ggml_type: GgmlType) -> tuple[int, int] | None:
    """Weights and bytes per block, or None for a type without a listed layout."""
    if isinstance(ggml_type, NewerType):
        return NEWER_SIZES[ggml_type]
    known = GGML_QUANT_SIZES.get(ggml_type)
    return None if known is None else (int(known[0]), int(known[1]))
