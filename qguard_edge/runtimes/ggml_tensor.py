"""Reading `struct ggml_tensor` by ctypes, after proving that the installed ggml lays it out as written here.

ggml has accessors for a tensor's name, data and size, but none for its inputs (`src`), and an evaluation callback is given a
tensor and nothing else. So the structure is spelled out (`ggml.h` of ggml 0.25) and, before anything is read with it, held
against the library itself: tensors of known shape are made, and every field that this project reads must say what the
accessors say. A library with another layout is an error, never a wrong number.
"""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import _ggml

from quant_grids.errors import QGuardError

FloatArray = npt.NDArray[np.float32]

TENSOR_FIELDS: tuple[tuple[str, Any], ...] = (
    ("type", ctypes.c_int32),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),  # elements, fastest dimension first
    ("nb", ctypes.c_size_t * 4),  # strides in bytes
    ("op", ctypes.c_int32),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.c_void_p * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
)
F32, F16, I32, BF16 = 0, 1, 26, 30
_NUMPY: dict[int, np.dtype[Any]] = {
    F32: np.dtype(np.float32),
    F16: np.dtype(np.float16),
    I32: np.dtype(np.int32),
    BF16: np.dtype(np.uint16),
}
_OBJECT_BYTES = 32  # of `struct ggml_object`, which precedes each tensor in a context


class GgmlTensor(ctypes.Structure):
    """`struct ggml_tensor`; see `prove_layout` before reading one."""

    _fields_ = TENSOR_FIELDS


class GgmlLayoutError(QGuardError):
    """The installed ggml lays its tensors out in another way, or holds one in a way that cannot be read."""


@dataclass(frozen=True)
class Ops:
    """Numbers of operations in the installed ggml."""

    mul_mat: int
    mul_mat_id: int
    reshape: int
    view: int


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@functools.cache
def library() -> ctypes.CDLL:
    """The ggml that llama.cpp itself uses, with the signatures of what is called here.

    Raises:
        GgmlLayoutError: the installed ggml lacks a function.
    """
    # Through llama.cpp's own handle, which finds libggml-base behind it: a wheel holds each library under several names, and
    # opening another of them would load a second copy. A handle of our own keeps our signatures to ourselves.
    lib = ctypes.CDLL(None, handle=_ggml.libggml._handle)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor": (pointer, [pointer, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int64)]),
        "ggml_mul_mat": (pointer, [pointer] * 3),
        "ggml_mul_mat_id": (pointer, [pointer] * 4),
        "ggml_reshape_2d": (pointer, [pointer, pointer, ctypes.c_int64, ctypes.c_int64]),
        "ggml_reshape_3d": (pointer, [pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]),
        "ggml_view_2d": (pointer, [pointer, pointer, ctypes.c_int64, ctypes.c_int64, size, size]),
        "ggml_transpose": (pointer, [pointer, pointer]),
        "ggml_set_name": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_get_name": (pointer, [pointer]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_nelements": (ctypes.c_int64, [pointer]),
        "ggml_nbytes": (size, [pointer]),
        "ggml_op_desc": (ctypes.c_char_p, [pointer]),
        "ggml_type_name": (ctypes.c_char_p, [ctypes.c_int]),
        "ggml_tensor_overhead": (size, []),
        "ggml_is_transposed": (ctypes.c_bool, [pointer]),
        "ggml_backend_dev_count": (size, []),
        "ggml_backend_cpu_buffer_type": (pointer, []),
        "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, [pointer, pointer]),
        "ggml_backend_buffer_free": (None, [pointer]),
        "ggml_backend_buffer_is_host": (ctypes.c_bool, [pointer]),
        "ggml_backend_tensor_get": (None, [pointer, pointer, size, size]),
    }
    for name, (result, arguments) in signatures.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise GgmlLayoutError(f"the installed ggml has no function {name}; activations cannot be read") from None
        function.restype, function.argtypes = result, arguments
    return lib


def prove_layout(structure: type[Any] = GgmlTensor) -> Ops:
    """Hold a structure against tensors that the library makes.

    Args:
        structure: with the field names of `TENSOR_FIELDS`.

    Raises:
        GgmlLayoutError: a field says something else than the library's accessors.
    """
    lib = library()
    context = lib.ggml_init(_InitParams(1 << 16, None, True))
    buffer = None
    try:
        made = _example(lib, context)
        buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, lib.ggml_backend_cpu_buffer_type())
        return _check(lib, structure, made, buffer)
    finally:
        if buffer:
            lib.ggml_backend_buffer_free(buffer)
        lib.ggml_free(context)


def _example(lib: ctypes.CDLL, context: int) -> dict[str, int]:
    """A few tensors by name, whose every property is known."""

    def new(kind: int, *sizes: int) -> int:
        return int(lib.ggml_new_tensor(context, kind, len(sizes), (ctypes.c_int64 * len(sizes))(*sizes)))

    made = {"weight": new(F16, 6, 3), "input": new(F32, 6, 7), "experts": new(F16, 6, 3, 4), "rows": new(F32, 6, 1, 7)}
    made["routes"] = new(I32, 2, 7)
    made["product"] = lib.ggml_mul_mat(context, made["weight"], made["input"])
    made["routed"] = lib.ggml_mul_mat_id(context, made["experts"], made["rows"], made["routes"])
    made["reshaped"] = lib.ggml_reshape_2d(context, made["input"], 7, 6)
    made["view"] = lib.ggml_view_2d(context, made["input"], 5, 2, 24, 48)
    made["turned"] = lib.ggml_transpose(context, made["input"])
    for name, address in made.items():
        lib.ggml_set_name(address, name.encode())
    return made


def _check(lib: ctypes.CDLL, structure: type[Any], made: dict[str, int], buffer: int) -> Ops:
    """See `prove_layout`."""
    read = {name: structure.from_address(address) for name, address in made.items()}
    checks: list[tuple[str, Any, Any]] = [
        ("size", ctypes.sizeof(structure), lib.ggml_tensor_overhead() - _OBJECT_BYTES),
        ("type of f32", lib.ggml_type_name(F32), b"f32"),
        ("type of f16", lib.ggml_type_name(F16), b"f16"),
        ("type of i32", lib.ggml_type_name(I32), b"i32"),
        ("type of bf16", lib.ggml_type_name(BF16), b"bf16"),
    ]
    kinds = {"weight": F16, "experts": F16, "routes": I32}
    shapes = {
        "weight": (6, 3, 1, 1), "input": (6, 7, 1, 1), "experts": (6, 3, 4, 1), "rows": (6, 1, 7, 1), "routes": (2, 7, 1, 1),
        "product": (3, 7, 1, 1), "routed": (3, 2, 7, 1), "reshaped": (7, 6, 1, 1), "view": (5, 2, 1, 1), "turned": (7, 6, 1, 1),
    }  # fmt: skip
    for name, address in made.items():
        tensor = read[name]
        checks += [
            (f"type of {name}", tensor.type, kinds.get(name, F32)),
            (f"sizes of {name}", tuple(tensor.ne), shapes[name]),
            (f"elements of {name}", int(np.prod(shapes[name])), lib.ggml_nelements(address)),
            (f"bytes of {name}", _span(tensor), lib.ggml_nbytes(address)),
            (f"address of the name of {name}", address + structure.name.offset, lib.ggml_get_name(address)),
            (f"name of {name}", tensor.name, name.encode()),
            (f"data of {name}", tensor.data, lib.ggml_get_data(address)),
            (f"buffer of {name}", tensor.buffer, buffer),
        ]
    inputs = {
        "input": (None, None, None),
        "product": (made["weight"], made["input"], None),
        "routed": (made["experts"], made["rows"], made["routes"]),
    }
    checks += [(f"inputs of {name}", tuple(read[name].src[:3]), expected) for name, expected in inputs.items()]
    checks += [
        ("view_src of a reshaped tensor", read["reshaped"].view_src, made["input"]),
        ("view_src of a view", read["view"].view_src, made["input"]),
        ("view_src of a tensor of its own", read["input"].view_src, None),
        ("view_offs of a view", read["view"].view_offs, 48),
        ("strides of a view", tuple(read["view"].nb[:2]), (4, 24)),
        ("strides of a transposed tensor", tuple(read["turned"].nb[:2]), (24, 4)),
        ("transposition", lib.ggml_is_transposed(made["turned"]), True),
    ]
    ops = {"product": b"MUL_MAT", "routed": b"MUL_MAT_ID", "reshaped": b"RESHAPE", "view": b"VIEW"}
    checks += [(f"operation of {name}", lib.ggml_op_desc(made[name]), text) for name, text in ops.items()]
    numbers = [read[name].op for name in ("input", *ops)]
    checks += [("operations that differ", len(set(numbers)), len(numbers)), ("no operation", numbers[0], 0)]
    for what, found, expected in checks:
        if found != expected:
            raise GgmlLayoutError(
                f"the ggml of llama-cpp-python {llama_cpp.__version__} lays out its tensors in a way that this version does "
                f"not know ({what}: {found!r} instead of {expected!r}); activations cannot be read from it"
            )
    return Ops(*numbers[1:])


def _span(tensor: Any) -> int:
    """Bytes from the first element of a float or integer tensor to the end of its last."""
    itemsize = _NUMPY[tensor.type].itemsize if tensor.type in _NUMPY else 0
    return int(itemsize + sum((count - 1) * stride for count, stride in zip(tensor.ne, tensor.nb, strict=True)))


@functools.cache
def operations() -> Ops:
    """`prove_layout` of the structure used here, once."""
    return prove_layout()


def one_backend() -> bool:
    """Whether ggml knows the processor alone, so that a graph is never cut into pieces for several backends."""
    return int(library().ggml_backend_dev_count()) == 1


def tensor_at(address: int) -> GgmlTensor:
    """The tensor at an address that ggml gave. Valid as long as ggml keeps it."""
    operations()
    return GgmlTensor.from_address(address)


def read_array(address: int, *, copy: bool = False) -> npt.NDArray[Any]:
    """A tensor's values: f32 (or i32) `[ne3, ne2, ne1, ne0]`.

    Args:
        address: of a tensor that has been computed.
        copy: fetch through the backend even where the memory could be read in place.

    Returns:
        Where the memory is the host's and the type f32, a view that is valid until the graph goes on; else a copy.

    Raises:
        GgmlLayoutError: its type is not f32, f16, bf16 or i32, or it has no memory.
    """
    tensor, lib = tensor_at(address), library()
    if tensor.type not in _NUMPY:
        raise GgmlLayoutError(f"it has the type {lib.ggml_type_name(tensor.type).decode()}")
    if not tensor.buffer or not tensor.data:
        raise GgmlLayoutError("it has no memory")
    size = lib.ggml_nbytes(address)
    if copy or not lib.ggml_backend_buffer_is_host(tensor.buffer):
        raw = np.empty(size, np.uint8)
        lib.ggml_backend_tensor_get(address, raw.ctypes.data, 0, size)
    else:
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(tensor.data))
    strided = np.ndarray(tuple(tensor.ne)[::-1], _NUMPY[tensor.type], raw, strides=tuple(tensor.nb)[::-1])
    if tensor.type == BF16:
        return (strided.astype(np.uint32) << 16).view(np.float32)
    return strided.astype(np.float32) if tensor.type == F16 else strided


EvalCallback = Callable[[int, bool], bool]
"""Called with a node's address and whether llama.cpp only asks; see `ggml_backend_sched_eval_callback` in ggml."""


def eval_callback(function: EvalCallback) -> Any:
    """`function` as a C callback; the caller keeps it alive as long as llama.cpp may call it. It must not raise."""
    return llama_cpp.ggml_backend_sched_eval_callback(lambda address, ask, _user_data: function(int(address), bool(ask)))
