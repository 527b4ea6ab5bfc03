"""Stream tensors from and to files in slices of whole rows, with positioned reads: no memory maps, no growth with the model.

A memory map of a model would count towards the process's resident size page by page; `pread` into a buffer does not.
"""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from convert.gguf_file import TensorInfo
from quant_grids import grid_for
from quant_grids.errors import FormatError
from quant_grids.ggml_type import GgmlType

SLICE_WEIGHTS = 1 << 18
"""Weights per slice: one megabyte of f32. Smaller ones lose to Python's overhead per operation, larger ones to the cache
(measured: 30, 51, 82, 104, 90 M weights/s on two cores for slices of 2^15 ... 2^19)."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 1 << 28

FLOAT_TYPES: dict[GgmlType, torch.dtype] = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


@dataclass(frozen=True)
class RowSlice:
    """Rows `start` to `stop` of a tensor; `index` counts slices from 0."""

    index: int
    start: int
    stop: int


def row_slices(tensor: TensorInfo, weights: int = SLICE_WEIGHTS) -> list[RowSlice]:
    """Cut a tensor into slices of whole rows with about `weights` weights each (at least one row)."""
    step = max(1, weights // tensor.columns)
    starts = range(0, tensor.rows, step)
    return [RowSlice(i, start, min(start + step, tensor.rows)) for i, start in enumerate(starts)]


class TensorReader:
    """Positioned reads from the files of one or more models; safe to use from several threads.

    Use `open_reader`; the files are closed on exit.
    """

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def add(self, path: Path) -> None:
        """Open a file for reading, once."""
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def bytes(self, tensor: TensorInfo, part: RowSlice) -> Tensor:
        """Stored bytes of some rows: uint8 `[rows * row_bytes]`.

        Raises:
            FormatError: the file ended early (it changed since its header was read).
        """
        size = (part.stop - part.start) * tensor.row_bytes
        data = torch.empty(size, dtype=torch.uint8)
        view = memoryview(data.numpy().data)
        position = tensor.offset + part.start * tensor.row_bytes
        done = 0
        while done < size:
            count = os.preadv(self._files[tensor.path], [view[done:]], position + done)
            if count == 0:
                raise FormatError(f"{tensor.path.name} ended inside tensor {tensor.name!r}; it changed while being read")
            done += count
        return data

    def blocks(self, tensor: TensorInfo, part: RowSlice) -> Tensor:
        """Stored blocks of some rows: uint8 `[n_blocks, type_size]`."""
        return self.bytes(tensor, part).view(-1, grid_for(tensor.ggml_type).type_size)

    def weights(self, tensor: TensorInfo, part: RowSlice) -> Tensor:
        """Weights of some rows, dequantized if need be: f32 `[rows, columns]`."""
        rows = part.stop - part.start
        dtype = FLOAT_TYPES.get(tensor.ggml_type)
        if dtype is not None:
            return self.bytes(tensor, part).view(dtype).view(rows, tensor.columns).float()
        return grid_for(tensor.ggml_type).dequantize(self.blocks(tensor, part)).view(rows, tensor.columns)


@contextmanager
def open_reader(*paths: Path) -> Iterator[TensorReader]:
    """A `TensorReader` with the given files open."""
    reader = TensorReader()
    with ExitStack() as stack:
        stack.callback(reader.close)
        for path in paths:
            reader.add(path)
        yield reader


def _keep_freed_memory() -> None:
    """Ask glibc to keep freed buffers instead of handing each back to the system.

    A slice frees and takes a dozen one-megabyte arrays; with the default thresholds every one of them is mapped and zeroed
    anew (556,000 page faults and a quarter of the time for 151 M weights). Elsewhere than on glibc nothing is done.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Let torch use one thread per operation: slices are spread over threads instead, each staying in its core's cache."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    _keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(before)
