"""libggml itself, through ctypes: the oracle that the grids are held against.

llama-cpp-python ships `libggml-base`, which exports the quantizers and a table of type traits with the dequantizers. A
missing or changed library is an error, never a skipped test.
"""

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h; `type_traits` checks that it still has this shape."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class TypeTraits:
    """What libggml says about a storage type."""

    name: str
    block_size: int
    type_size: int
    is_quantized: bool
    to_float: int | None


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded libggml-base of the installed llama-cpp-python."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise RuntimeError("llama-cpp-python is not installed; it carries the libggml these tests compare with")
    folder = Path(spec.origin).parent / "lib"
    for name in NAMES:
        if (folder / name).exists():
            lib = ctypes.CDLL(str(folder / name))
            lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
            lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
            lib.ggml_quantize_chunk.restype = ctypes.c_size_t
            lib.ggml_quantize_chunk.argtypes = [
                ctypes.c_int,
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.c_int64,
                ctypes.c_int64,
                ctypes.c_int64,
                ctypes.c_void_p,
            ]
            lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
            lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
            lib.ggml_type_size.restype = ctypes.c_size_t
            lib.ggml_type_size.argtypes = [ctypes.c_int]
            lib.ggml_blck_size.restype = ctypes.c_int64
            lib.ggml_blck_size.argtypes = [ctypes.c_int]
            return lib
    raise RuntimeError(f"{folder} has none of {', '.join(NAMES)}")


@functools.cache
def type_traits(number: int) -> TypeTraits:
    """The traits of the type with that number in `enum ggml_type`."""
    lib = library()
    raw = lib.ggml_get_type_traits(number).contents
    if (raw.blck_size, raw.type_size) != (lib.ggml_blck_size(number), lib.ggml_type_size(number)):
        raise RuntimeError("struct ggml_type_traits has changed; bring _Traits in line with ggml.h")
    name = raw.type_name.decode() if raw.type_name else ""
    return TypeTraits(name, raw.blck_size, raw.type_size, raw.is_quantized, raw.to_float)


def requires_importance(number: int) -> bool:
    """Whether the type's quantizer refuses to run without an importance matrix."""
    return bool(library().ggml_quantize_requires_imatrix(number))


def quantize(number: int, weights: Floats, importance: Floats | None = None) -> Bytes:
    """Quantize rows with libggml.

    Args:
        number: the type's number.
        weights: f32 `[rows, columns]`, `columns` a multiple of the block size.
        importance: f32 `[columns]`; required by some types.

    Returns:
        uint8 `[n_blocks, type_size]`.
    """
    traits = type_traits(number)
    weights = np.ascontiguousarray(weights, np.float32)
    rows, columns = weights.shape
    if columns % traits.block_size:
        raise ValueError(f"{columns} columns are not a multiple of {traits.block_size}")
    if importance is None and requires_importance(number):
        raise ValueError(f"{traits.name} needs an importance")
    blocks = np.zeros((weights.size // traits.block_size, traits.type_size), np.uint8)
    pointer = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != (columns,):
            raise ValueError(f"importance of shape {importance.shape}, not ({columns},)")
        pointer = importance.ctypes.data
    written = library().ggml_quantize_chunk(number, weights.ctypes.data, blocks.ctypes.data, 0, rows, columns, pointer)
    if written != blocks.nbytes:
        raise RuntimeError(f"{traits.name}: libggml wrote {written} bytes, not {blocks.nbytes}")
    return blocks


def dequantize(number: int, blocks: Bytes) -> Floats:
    """Dequantize blocks, uint8 `[n_blocks, type_size]`, with libggml: f32 `[n_blocks, block_size]`."""
    traits = type_traits(number)
    if traits.to_float is None:
        raise RuntimeError(f"{traits.name} has no dequantizer")
    if blocks.ndim != 2 or blocks.shape[1] != traits.type_size:
        raise ValueError(f"blocks of shape {blocks.shape}, not (n, {traits.type_size})")
    blocks = np.ascontiguousarray(blocks)
    values = np.zeros((len(blocks), traits.block_size), np.float32)
    TO_FLOAT(traits.to_float)(blocks.ctypes.data, values.ctypes.data, values.size)
    return values
