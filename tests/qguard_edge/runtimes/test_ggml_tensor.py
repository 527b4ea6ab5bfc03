"""The structure that is read from llama.cpp's memory: proven against the library, and refused when it does not hold."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from qguard_edge.runtimes import ggml_tensor
from qguard_edge.runtimes.ggml_tensor import (
    BF16,
    F16,
    F32,
    TENSOR_FIELDS,
    GgmlLayoutError,
    GgmlTensor,
    library,
    operations,
    prove_layout,
    read_array,
    tensor_at,
)


def changed(fields: list[tuple[str, Any]]) -> type[ctypes.Structure]:
    return type("Changed", (ctypes.Structure,), {"_fields_": fields})


@contextmanager
def context() -> Iterator[tuple[ctypes.CDLL, int, list[int]]]:
    """ggml's library, a context without memory, and a list for the buffers made in it."""
    lib = library()
    made = lib.ggml_init(ggml_tensor._InitParams(1 << 16, None, True))
    buffers: list[int] = []
    try:
        yield lib, made, buffers
    finally:
        for buffer in buffers:
            lib.ggml_backend_buffer_free(buffer)
        lib.ggml_free(made)


def test_the_installed_library_is_laid_out_as_written() -> None:
    ops = operations()
    assert len({ops.mul_mat, ops.mul_mat_id, ops.reshape, ops.view}) == 4


@pytest.mark.parametrize("first", range(len(TENSOR_FIELDS) - 2))
def test_two_fields_that_have_changed_places_are_found(first: int) -> None:
    fields = list(TENSOR_FIELDS)
    fields[first], fields[first + 1] = fields[first + 1], fields[first]
    structure = changed(fields)
    read = ("type", "buffer", "ne", "nb", "op", "src", "view_src", "view_offs", "data", "name")
    if all(getattr(structure, name).offset == getattr(GgmlTensor, name).offset for name in read):
        assert prove_layout(structure) == operations()  # only fields that nobody reads have moved
        return
    with pytest.raises(GgmlLayoutError, match=r"lays out its tensors in a way that this version does not know \("):
        prove_layout(structure)


@pytest.mark.parametrize("position", range(len(TENSOR_FIELDS)))
def test_a_field_too_many_is_found(position: int) -> None:
    fields = list(TENSOR_FIELDS)
    fields.insert(position, ("news", ctypes.c_int64))
    with pytest.raises(GgmlLayoutError, match="activations cannot be read from it"):
        prove_layout(changed(fields))


@pytest.mark.parametrize("kind", [F32, F16, BF16])
@pytest.mark.parametrize("copy", [False, True])
def test_values_of_permuted_and_cut_tensors(kind: int, copy: bool) -> None:
    values = np.random.default_rng(0).standard_normal((7, 6)).astype(np.float32)
    values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32) if kind == BF16 else values
    as_stored: dict[int, np.ndarray[Any, Any]] = {
        F32: values,
        F16: values.astype(np.float16),
        BF16: (values.view(np.uint32) >> 16).astype(np.uint16),
    }
    stored = as_stored[kind]
    with context() as (lib, made, buffers):
        whole = lib.ggml_new_tensor(made, kind, 2, (ctypes.c_int64 * 2)(6, 7))
        size = stored.itemsize
        turned = lib.ggml_transpose(made, whole)
        cut = lib.ggml_view_2d(made, whole, 4, 3, 6 * size, 12 * size)
        buffers.append(lib.ggml_backend_alloc_ctx_tensors_from_buft(made, lib.ggml_backend_cpu_buffer_type()))
        ctypes.memmove(tensor_at(whole).data, stored.ctypes.data, stored.nbytes)
        expected = stored.astype(np.float32) if kind != BF16 else values
        assert (read_array(whole, copy=copy)[0, 0] == expected).all()
        assert (read_array(turned, copy=copy)[0, 0] == expected.T).all()
        assert (read_array(cut, copy=copy)[0, 0] == expected[2:5, :4]).all()


def test_what_cannot_be_read_is_a_sentence() -> None:
    with context() as (lib, made, _buffers):
        quantized = lib.ggml_new_tensor(made, 2, 2, (ctypes.c_int64 * 2)(32, 2))
        with pytest.raises(GgmlLayoutError, match="q4_0"):
            read_array(quantized)
        empty = lib.ggml_new_tensor(made, F32, 2, (ctypes.c_int64 * 2)(32, 2))
        with pytest.raises(GgmlLayoutError, match="no memory"):
            read_array(empty)
