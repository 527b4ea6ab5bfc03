"""A copy of a full-precision GGUF in which some tensors are widened to F32, to be filled with moved weights.

Papers that leave the quantizer alone change the weights before it; llama.cpp then reads this copy in place of the base. F32,
because the moves are small against the steps of bf16. Metadata is repeated byte for byte; a split base becomes one file.
"""

import os
import struct
from collections.abc import Collection
from pathlib import Path

from gguf import GGMLQuantizationType
from torch import Tensor

from convert.gguf_file import GgufModel, TensorInfo
from convert.patch import copy_tensor, write_all

_F32_BYTES = 4


class FloatCopy:
    """Writes one such copy; fill every widened tensor with `write_rows`, then `close`.

    Args:
        base: the model to copy.
        path: the new file.
        widened: names of the tensors to store as F32; the others are copied at once.
    """

    def __init__(self, base: GgufModel, path: Path, widened: Collection[str]) -> None:
        first = base.first
        kept = [field for key, field in first.fields.items() if not key.startswith("split.")]
        infos, offset = [], 0
        self._offsets: dict[str, int] = {}
        for tensor in base.tensors.values():
            wide = tensor.name in widened
            number = int(GGMLQuantizationType.F32 if wide else tensor.ggml_type)
            name = tensor.name.encode()
            shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
            infos.append(struct.pack("<Q", len(name)) + name + shape + struct.pack("<IQ", number, offset))
            self._offsets[tensor.name] = offset
            size = tensor.n_weights * _F32_BYTES if wide else tensor.n_bytes
            offset += -(-size // first.alignment) * first.alignment
        header = b"GGUF" + struct.pack("<IQQ", first.version, len(base.tensors), len(kept))
        header += b"".join(first.raw(field.start, field.end) for field in kept) + b"".join(infos)
        header += b"\0" * (-len(header) % first.alignment)
        self._data_start = len(header)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        write_all(self._file, header, 0)
        os.ftruncate(self._file, self._data_start + offset)
        for tensor in base.tensors.values():
            if tensor.name not in widened:
                copy_tensor(tensor, self._file, self._data_start + self._offsets[tensor.name])

    def write_rows(self, tensor: TensorInfo, row: int, weights: Tensor) -> None:
        """Write f32 `[rows, columns]` from row `row` on; safe to call from several threads."""
        position = self._data_start + self._offsets[tensor.name] + row * tensor.columns * _F32_BYTES
        write_all(self._file, weights.contiguous().cpu().numpy().reshape(-1).data, position)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
