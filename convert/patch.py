"""The patch: a copy of the plain GGUF with other code bits and `qguard.*` metadata, nothing else.

The plain file's metadata entries and tensor infos are repeated byte for byte (earlier `qguard.*` entries are dropped, new
ones added at the end), the data section keeps its layout, and each hardened tensor's rows are overwritten in place. The
caller fills a temporary file, has it checked, and renames it.
"""

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor
from typing_extensions import Buffer

from convert.gguf_file import GgufFile, TensorInfo, encode_key_value

PREFIX = "qguard."
_COPY_CHUNK = 1 << 22


class GgufPatch:
    """Writes one patched copy of `plain` to `path`.

    Attributes:
        plain: header of the file that is copied; it must not change meanwhile.
        path: the (temporary) output.
    """

    def __init__(self, plain: GgufFile, path: Path, metadata: Mapping[str, bool | int | float | str]) -> None:
        self.plain, self.path = plain, path
        self._header = self._make_header(metadata)
        self._data_start = len(self._header)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            self._write(self._header, 0)
            os.ftruncate(self._file, self._data_start + plain.size - plain.data_start)
        except BaseException:
            self.close()
            raise

    def _make_header(self, metadata: Mapping[str, bool | int | float | str]) -> bytes:
        plain = self.plain
        kept = [field for key, field in plain.fields.items() if not key.startswith(PREFIX)]
        entries = [plain.raw(field.start, field.end) for field in kept]
        entries += [encode_key_value(PREFIX + key, value) for key, value in metadata.items()]
        infos = plain.raw(plain.infos_start, plain.data_start)
        # The infos are followed by padding up to the old data section; cut it off and pad anew.
        infos = infos[: _infos_length(infos, len(plain.tensors))]
        head = b"GGUF" + struct.pack("<IQQ", plain.version, len(plain.tensors), len(entries))
        header = head + b"".join(entries) + infos
        return header + b"\0" * (-len(header) % plain.alignment)

    def rewrite_metadata(self, metadata: Mapping[str, bool | int | float | str]) -> None:
        """Replace the `qguard.*` entries; keys and the lengths of their values must stay the same."""
        header = self._make_header(metadata)
        assert len(header) == self._data_start
        self._write(header, 0)

    def write_rows(self, tensor: TensorInfo, row: int, blocks: Tensor) -> None:
        """Write new blocks from row `row` on; safe to call from several threads."""
        position = tensor.offset - self.plain.data_start + self._data_start + row * tensor.row_bytes
        self._write(blocks.contiguous().cpu().numpy().reshape(-1).data, position)

    def copy_rest(self, written: Iterable[str]) -> None:
        """Copy every byte of the data section that does not belong to one of the `written` tensors."""
        plain = self.plain
        done = sorted((plain.tensors[name] for name in written), key=lambda tensor: tensor.offset)
        position = plain.data_start
        with plain.path.open("rb") as source:
            for tensor in [*done, None]:
                stop = plain.size if tensor is None else tensor.offset
                source.seek(position)
                while position < stop:
                    chunk = source.read(min(_COPY_CHUNK, stop - position))
                    self._write(chunk, position - plain.data_start + self._data_start)
                    position += len(chunk)
                if tensor is not None:
                    position = tensor.offset + tensor.n_bytes

    def _write(self, data: Buffer, position: int) -> None:
        write_all(self._file, data, position)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def write_all(descriptor: int, data: Buffer, position: int) -> None:
    """Write every byte of a buffer at a position of a file, however many calls it takes."""
    view = memoryview(data).cast("B")
    while len(view):
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


def copy_tensor(tensor: TensorInfo, descriptor: int, position: int) -> None:
    """Copy a tensor's bytes to a position of another file."""
    with tensor.path.open("rb") as source:
        source.seek(tensor.offset)
        left = tensor.n_bytes
        while left and (chunk := source.read(min(_COPY_CHUNK, left))):
            write_all(descriptor, chunk, position)
            position, left = position + len(chunk), left - len(chunk)


def _infos_length(infos: bytes, count: int) -> int:
    """Length of `count` tensor infos, without the padding that follows them."""
    position = 0
    for _ in range(count):
        (name_size,) = struct.unpack_from("<Q", infos, position)
        position += 8 + name_size
        (n_dims,) = struct.unpack_from("<I", infos, position)
        position += 4 + 8 * n_dims + 4 + 8
    return position
