"""Importance matrices: how much the error of each input column matters to a tensor's output.

`llama-imatrix` runs a model on text and records, per weight matrix, the mean square of every input channel. llama.cpp's
quantizers weigh the squared error with it. Two file formats exist (source: `common/imatrix-loader.cpp` of llama.cpp):

* GGUF (`general.type = "imatrix"`): F32 tensors `NAME.in_sum2` (sums of squares, one row per expert) and `NAME.counts`
  (tokens, one per expert); the weight is their quotient, 1 where an expert saw no token;
* legacy `.dat`: a count of entries, then per entry a name, a number of calls and that many sums; the weight is sums / calls.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

from convert.atomic import atomic_path
from convert.gguf_file import GgufFile
from convert.reading import open_file, read_file
from quant_grids.errors import FormatError

FloatArray = npt.NDArray[np.float32]
LARGEST_LEGACY = 4 << 30
"""Bytes of an importance matrix in the old format; a model of 70 billion weights has one of some 100 MB."""


@dataclass(frozen=True)
class Imatrix:
    """A loaded importance matrix.

    Attributes:
        entries: per tensor name, f32 `[experts * columns]` mean squares.
        datasets: names of the texts it was made from, as recorded in the file.
        chunk_count: chunks of text, 0 if unknown.
        file_name: name of the file, without its folder.
    """

    entries: Mapping[str, FloatArray]
    datasets: tuple[str, ...]
    chunk_count: int
    file_name: str

    def for_tensor(self, name: str, columns: int, experts: int) -> FloatArray | None:
        """Weights of a tensor's columns, f32 `[experts, columns]`; None if the file has no fitting entry."""
        entry = self.entries.get(name)
        if entry is None or entry.size != columns * experts:
            return None
        return entry.reshape(experts, columns)


def load_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix of either format.

    Raises:
        FormatError: the file is neither, is cut off, or holds numbers that are not finite.
    """
    try:
        with open_file(path) as file:
            magic = file.read(4)
    except OSError as error:
        raise FormatError(f"cannot read the importance matrix {path.name}: {error.strerror}") from error
    loaded = _load_gguf(path) if magic == b"GGUF" else _load_legacy(path)
    for name, values in loaded.entries.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise FormatError(f"{path.name}: the entry {name!r} has values that are negative or not finite")
    return loaded


def _load_gguf(path: Path) -> Imatrix:
    file = GgufFile(path)
    entries: dict[str, FloatArray] = {}
    for name, info in file.tensors.items():
        stem = name.removesuffix(".in_sum2")
        if stem == name:
            continue
        counts_info = file.tensors.get(f"{stem}.counts")
        if counts_info is None or {info.ggml_type, counts_info.ggml_type} != {GGMLQuantizationType.F32}:
            raise FormatError(f"{path.name}: {name!r} has no F32 counts beside it; this is not an importance matrix")
        sums = np.frombuffer(file.raw(info.offset, info.offset + info.n_bytes), np.float32)
        counts = np.frombuffer(file.raw(counts_info.offset, counts_info.offset + counts_info.n_bytes), np.float32)
        counts = np.rint(counts)
        if sums.size % counts.size:
            raise FormatError(f"{path.name}: {name!r} has {sums.size} sums for {counts.size} counts")
        rows = sums.reshape(counts.size, -1)
        safe = np.where(counts > 0, counts, 1.0)[:, None]
        entries[stem] = np.where(counts[:, None] > 0, rows / safe, 1.0).astype(np.float32).reshape(-1)
    if not entries:
        raise FormatError(f"{path.name} is a GGUF without importance entries (no tensor named *.in_sum2)")
    datasets = file.get("imatrix.datasets", [])
    chunks = file.get("imatrix.chunk_count", 0)
    names = tuple(Path(str(name)).name for name in datasets) if isinstance(datasets, list) else ()
    return Imatrix(entries, names, chunks if isinstance(chunks, int) else 0, path.name)


def _load_legacy(path: Path) -> Imatrix:
    data = read_file(path, LARGEST_LEGACY)
    position = 0

    def take(size: int) -> bytes:
        nonlocal position
        if not 0 <= size <= len(data) - position:
            raise FormatError(
                f"{path.name}: byte {position} claims {size} bytes, {len(data) - position} are left; not an importance matrix"
            )
        position += size
        return data[position - size : position]

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    entries: dict[str, FloatArray] = {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        calls, count = number(), number()
        sums = np.frombuffer(take(4 * count), np.float32)
        entries[name] = (sums / calls if calls > 0 else sums).astype(np.float32)
    chunks = number() if position < len(data) else 0
    dataset = take(number()).decode("utf-8", "replace") if position < len(data) else ""
    if not entries:
        raise FormatError(f"{path.name} holds no importance entries")
    return Imatrix(entries, (Path(dataset).name,) if dataset else (), chunks, path.name)


def write_imatrix(
    path: Path,
    sums: Mapping[str, FloatArray],
    counts: Mapping[str, FloatArray],
    *,
    dataset: str,
    chunks: int,
    chunk_size: int,
) -> None:
    """Write an importance matrix in llama.cpp's GGUF format.

    Args:
        path: output file, replaced atomically.
        sums: per tensor name, f32 `[experts, columns]` sums of squares.
        counts: per tensor name, f32 `[experts]` tokens seen.
        dataset: name of the text.
        chunks: chunks of text.
        chunk_size: tokens per chunk.
    """
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", chunks)
        writer.add_uint32("imatrix.chunk_size", chunk_size)
        for name in sorted(sums):
            writer.add_tensor(f"{name}.in_sum2", np.atleast_2d(sums[name]).astype(np.float32))
            writer.add_tensor(f"{name}.counts", counts[name].reshape(-1, 1).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
