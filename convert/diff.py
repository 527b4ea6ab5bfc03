"""What differs between two GGUF files of the same layout, bit by bit: the proof that only code bits were chosen anew."""

import contextlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convert.gguf_file import GgufFile, GgufModel, TensorInfo, same_shape
from convert.patch import PREFIX
from convert.split import SPLIT
from convert.tensor_io import RowSlice, TensorReader, open_reader, row_slices, single_threaded_torch
from quant_grids import GRIDS
from quant_grids.errors import FormatError
from quant_grids.ggml_type import GgmlType


@dataclass(frozen=True)
class TensorDifference:
    """One tensor in both files.

    Attributes:
        name: the tensor.
        ggml_type: its type, the same in both.
        n_weights: its weights.
        codes_changed: codes that differ.
        largest_step: by how many levels at most.
        foreign_bytes: bytes that differ in bits which are not code bits.
        alignment: `<t', t> / <t, t>` against the base, if one was given and the tensor is quantized.
    """

    name: str
    ggml_type: GgmlType
    n_weights: int
    codes_changed: int
    largest_step: int
    foreign_bytes: int
    alignment: float | None


@dataclass(frozen=True)
class FileDifference:
    """Two files compared.

    Attributes:
        tensors: one entry per tensor, in file order.
        metadata: keys that differ, without `qguard.*`, and without `split.*`: how a file is cut is no part of what it holds.
        qguard_metadata: `qguard.*` keys that differ.
    """

    tensors: tuple[TensorDifference, ...]
    metadata: tuple[str, ...]
    qguard_metadata: tuple[str, ...]

    @property
    def only_code_bits(self) -> bool:
        """Whether nothing but code bits and `qguard.*` metadata differs."""
        return not self.metadata and all(tensor.foreign_bytes == 0 for tensor in self.tensors)

    @property
    def codes_changed(self) -> int:
        """Codes that differ, in all tensors."""
        return sum(tensor.codes_changed for tensor in self.tensors)

    def fault(self, planned: Mapping[str, int]) -> str:
        """What differs beside the codes that were to change, in words; empty for nothing.

        Args:
            planned: tensor name -> codes that were to change; 0 for those that are not named.
        """
        for tensor in self.tensors:
            wanted = planned.get(tensor.name, 0)
            if tensor.foreign_bytes or tensor.codes_changed != wanted:
                return (
                    f"{tensor.name!r} was not written as planned ({tensor.codes_changed} codes changed, {wanted} planned, "
                    f"{tensor.foreign_bytes} other bytes)"
                )
        return f"the metadata key {self.metadata[0]!r} changed" if self.metadata else ""


def compare_files(
    first: Path,
    second: Path,
    *,
    base: Path | None = None,
    threads: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> FileDifference:
    """Compare two GGUF files tensor by tensor.

    Args:
        first: for instance the plain file; of a split one the first shard, here and below.
        second: for instance the hardened file.
        base: the full-precision GGUF both were made from; adds each tensor's alignment.
        threads: slices compared at a time.
        progress: called with (tensors done, tensors in all, name).

    Raises:
        FormatError: the files do not hold the same tensors with the same types and shapes.
    """
    a, b = GgufModel(first), GgufModel(second)
    _check_layout(a, b)
    model = GgufModel(base) if base else None
    tensors = []
    paths = [shard.path for one in (a, b, model) if one for shard in one.shards]
    with open_reader(*paths) as reader, single_threaded_torch(), ThreadPoolExecutor(threads) as pool:
        for i, tensor in enumerate(a.tensors.values()):
            weights = model.tensors.get(tensor.name) if model else None
            tensors.append(_compare_tensor(reader, pool, tensor, b.tensors[tensor.name], weights))
            if progress:
                progress(i + 1, len(a.tensors), tensor.name)
    changed = _changed_keys(a.first, b.first)
    return FileDifference(
        tuple(tensors),
        tuple(key for key in changed if not key.startswith((PREFIX, SPLIT))),
        tuple(key for key in changed if key.startswith(PREFIX)),
    )


def difference_document(found: FileDifference) -> dict[str, Any]:
    """The comparison as JSON values."""
    return {
        "status": "pass" if found.only_code_bits else "fail",
        "only_code_bits": found.only_code_bits,
        "codes_changed": found.codes_changed,
        "metadata": list(found.metadata),
        "qguard_metadata": list(found.qguard_metadata),
        "tensors": [
            {
                "name": tensor.name,
                "type": tensor.ggml_type.name,
                "weights": tensor.n_weights,
                "codes_changed": tensor.codes_changed,
                "largest_step": tensor.largest_step,
                "foreign_bytes": tensor.foreign_bytes,
                "alignment": tensor.alignment,
            }
            for tensor in found.tensors
        ],
    }


def _check_layout(a: GgufModel, b: GgufModel) -> None:
    if a.tensors.keys() != b.tensors.keys():
        only = sorted(a.tensors.keys() ^ b.tensors.keys())
        raise FormatError(f"{a.path.name} and {b.path.name} do not hold the same tensors (first difference: {only[0]!r})")
    for name, tensor in a.tensors.items():
        other = b.tensors[name]
        if (tensor.ggml_type, tensor.shape) != (other.ggml_type, other.shape):
            raise FormatError(
                f"{name!r} is {tensor.ggml_type.name} {list(tensor.shape)} in {a.path.name} and {other.ggml_type.name} "
                f"{list(other.shape)} in {b.path.name}; diff compares files of the same layout"
            )


def _changed_keys(a: GgufFile, b: GgufFile) -> list[str]:
    """Keys whose entry is absent or has other bytes in one of the files."""

    def entry(file: GgufFile, key: str) -> bytes | None:
        field = file.fields.get(key)
        return None if field is None else file.raw(field.start, field.end)

    return [key for key in dict.fromkeys([*a.fields, *b.fields]) if entry(a, key) != entry(b, key)]


@dataclass(frozen=True)
class _SliceDifference:
    codes: int
    step: int
    foreign: int
    energy: float
    projection: float


def _compare_tensor(
    reader: TensorReader, pool: ThreadPoolExecutor, a: TensorInfo, b: TensorInfo, base: TensorInfo | None
) -> TensorDifference:
    if base is not None and not same_shape(base.shape, a.shape):
        raise FormatError(f"{a.name!r} has the shape {list(base.shape)} in {base.path.name} and {list(a.shape)} here")
    parts = list(pool.map(lambda part: _compare_slice(reader, a, b, base, part), row_slices(a)))
    energy = sum(part.energy for part in parts)
    alignment = None
    if base is not None and a.ggml_type in GRIDS:
        alignment = sum(part.projection for part in parts) / energy if energy > 0 else 1.0
    return TensorDifference(
        name=a.name,
        ggml_type=a.ggml_type,
        n_weights=a.n_weights,
        codes_changed=sum(part.codes for part in parts),
        largest_step=max((part.step for part in parts), default=0),
        foreign_bytes=sum(part.foreign for part in parts),
        alignment=alignment,
    )


def _compare_slice(
    reader: TensorReader, a: TensorInfo, b: TensorInfo, base: TensorInfo | None, part: RowSlice
) -> _SliceDifference:
    with torch.inference_mode():
        grid = GRIDS.get(a.ggml_type)
        if grid is None:
            return _SliceDifference(0, 0, int(torch.count_nonzero(reader.bytes(a, part) ^ reader.bytes(b, part))), 0.0, 0.0)
        first, second = reader.blocks(a, part), reader.blocks(b, part)
        changed = first ^ second
        codes = step = foreign = 0
        if bool(changed.any()):
            foreign = int(torch.count_nonzero(changed & ~grid.code_mask))
            codes, step = grid.changed_codes(first, second)
        if base is None:
            return _SliceDifference(codes, step, foreign, 0.0, 0.0)
        weights = reader.weights(base, part).view(-1)
        before = grid.dequantize(first).view(-1) - weights
        after = grid.dequantize(second).view(-1) - weights
        return _SliceDifference(codes, step, foreign, float(torch.dot(before, before)), float(torch.dot(before, after)))


def qguard_metadata(file: GgufFile) -> dict[str, object]:
    """The `qguard.*` entries of a file, prefix removed, parameters parsed."""
    found = {key.removeprefix(PREFIX): file.value(key) for key in file.fields if key.startswith(PREFIX)}
    if isinstance(found.get("params"), str):
        with contextlib.suppress(ValueError):
            found["params"] = json.loads(found["params"])
    return found
