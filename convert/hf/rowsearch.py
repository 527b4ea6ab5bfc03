"""The search behind `map_rows`: which parameter has the same row as this row of a GGUF tensor?

A parameter `[..., rows, columns]` is looked at as a list of rows; every row is hashed (keyed BLAKE2b,
64 bits, so that no model can be built to collide), and each GGUF tensor's rows are looked up. Both sides are first
cast to the narrower of their two types: a bfloat16 model loaded as float32 still matches its bfloat16 GGUF. GGUF rows
that no parameter has are looked for again in the parameters' *columns* (transposed layers).

Rows can repeat: padding rows of an embedding, copied layers, an output matrix that equals the embedding. Of several
tensors or parameters that have the same rows, the one whose name gguf's own name map pairs comes first, then the one
that shares most rows, then the one with most rows still without a partner; within a pair the first occurrence goes
with the first, the second with the second.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch

from convert.gguf_file import GgufModel, TensorInfo
from convert.hf.rowmap import IntArray, RowMap, RowSource, TensorRows, Unmapped, as_rows
from convert.tensor_io import FLOAT_TYPES, RowSlice, TensorReader, open_reader
from quant_grids.errors import UnsupportedError

HashArray = npt.NDArray[np.uint64]
BoolArray = npt.NDArray[np.bool_]

_CHUNK = 1 << 22  # elements hashed at a time
_SAMPLE = 64  # rows by which parameters are ranked for a tensor
_SIGNIFICAND = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def map_rows(base: Path, parameters: Mapping[str, torch.Tensor]) -> RowMap:
    """Finds where the rows of a model's parameters are in a base GGUF.

    Args:
        base: A full-precision GGUF (first shard of a split one).
        parameters: Parameters by name: `dict(model.named_parameters())`, or a `FolderParameters`. Not modified.

    Raises:
        FormatError: The GGUF is malformed.
        UnsupportedError: A tensor of the GGUF is quantized.
    """
    model = GgufModel(base)
    for tensor in model.tensors.values():
        if tensor.ggml_type not in FLOAT_TYPES:
            raise UnsupportedError(
                f"Tensor {tensor.name} is {tensor.ggml_type.name}; rows are found in F32, F16, BF16 only."
            )
    with open_reader(*(shard.path for shard in model.shards)) as reader:
        return _Search(model, parameters, reader).run()


@dataclass
class _View:
    """A parameter seen as rows, with the hash of each row in every type it has to be compared in."""

    name: str
    transposed: bool
    hashes: dict[torch.dtype, HashArray]
    found: BoolArray
    sorted: dict[torch.dtype, tuple[HashArray, IntArray]] = field(default_factory=dict)

    def ordered(self, dtype: torch.dtype) -> tuple[HashArray, IntArray]:
        """The hashes in ascending order, and the row of each."""
        if dtype not in self.sorted:
            order = np.argsort(self.hashes[dtype], kind="stable")
            self.sorted[dtype] = self.hashes[dtype][order], order
        return self.sorted[dtype]

    def count(self, hashes: HashArray, dtype: torch.dtype) -> tuple[int, int]:
        """How many of these hashes some row has, and how many of those rows have been found before."""
        ordered, order = self.ordered(dtype)
        at = np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)
        at = at[ordered[at] == hashes]
        return len(at), int(self.found[order[at]].sum())

    def pair(self, hashes: HashArray, dtype: torch.dtype) -> tuple[IntArray, IntArray]:
        """Pairs rows of a tensor with rows of this view that have the same hash.

        The k-th occurrence goes with the k-th that nothing has been paired with yet; when those run out, they start
        over, as for a matrix that is in the GGUF twice.

        Returns:
            Positions in `hashes`, ascending, and this view's row for each.
        """
        ordered, order = self.ordered(dtype)
        if self.found.any():
            order = order[np.lexsort((self.found[order], ordered))]
        start = np.searchsorted(ordered, hashes, side="left")
        count = np.searchsorted(ordered, hashes, side="right") - start
        matched = np.flatnonzero(count)
        by_hash = np.argsort(hashes[matched], kind="stable")
        repeated = hashes[matched][by_hash]
        occurrence = np.empty(len(matched), dtype=np.int64)
        occurrence[by_hash] = np.arange(len(matched)) - np.searchsorted(repeated, repeated, side="left")
        return matched, order[start[matched] + occurrence % np.maximum(count[matched], 1)]


class _Search:
    """One run of the search, holding what has been found so far."""

    def __init__(self, model: GgufModel, parameters: Mapping[str, torch.Tensor], reader: TensorReader) -> None:
        self.model, self.parameters, self.reader = model, parameters, reader
        self.key = secrets.token_bytes(16)
        self.hints = _name_hints(model, parameters)
        self.sources: dict[str, list[RowSource]] = {name: [] for name in model.tensors}
        self.free = {name: np.ones(tensor.rows, dtype=bool) for name, tensor in model.tensors.items()}
        self.found: dict[str, BoolArray] = {}

    def run(self) -> RowMap:
        """Looks for every GGUF row among the parameters' rows, then for the rest among their columns."""
        for transposed in (False, True):
            by_shape: dict[tuple[int, torch.dtype], list[_View]] = {}
            for columns, dtype, view in self._views(transposed):
                by_shape.setdefault((columns, dtype), []).append(view)
            for (columns, dtype), views in by_shape.items():
                for tensor in self._unfinished(columns):
                    self._match(tensor, views, _common(dtype, _type(tensor)))
        return self._result()

    def _unfinished(self, columns: int) -> list[TensorInfo]:
        """GGUF tensors of this width that have rows without a source."""
        return [t for t in self.model.tensors.values() if t.columns == columns and self.free[t.name].any()]

    def _views(self, transposed: bool) -> Iterator[tuple[int, torch.dtype, _View]]:
        """The parameters as rows, or as columns those that have not been found; each is read once."""
        for name, parameter in self.parameters.items():
            if parameter.dtype not in _SIGNIFICAND or parameter.numel() == 0:
                continue
            if transposed and (parameter.ndim < 2 or self.found[name].all()):
                continue
            rows = as_rows(parameter.detach(), transposed)
            columns = rows.shape[1]
            types = {_common(parameter.dtype, _type(tensor)) for tensor in self._unfinished(columns)}
            view = _View(name, transposed, {t: self._hash_rows(rows, t) for t in types}, np.zeros(rows.shape[0], dtype=bool))
            if not transposed:
                self.found[name] = view.found
            if types:
                yield columns, parameter.dtype, view

    def _match(self, tensor: TensorInfo, views: Sequence[_View], dtype: torch.dtype) -> None:
        """Finds sources for the free rows of one tensor."""
        hashes = self._hash_tensor(tensor, dtype)
        distinct = np.unique(hashes)
        sample = distinct[:: max(1, len(distinct) // _SAMPLE)]  # hashes are random, so this is a random sample
        ranked = sorted(views, key=lambda view: self._rank(view, tensor, sample, dtype))
        for view in ranked:
            free = np.flatnonzero(self.free[tensor.name])
            if not len(free):
                return
            positions, rows = view.pair(hashes[free], dtype)
            if not len(positions):
                continue
            self.free[tensor.name][free[positions]] = False
            view.found[rows] = True
            self.sources[tensor.name].append(RowSource(view.name, view.transposed, free[positions], rows))
            if view.transposed and view.found.all():
                self.found[view.name][:] = True

    def _rank(self, view: _View, tensor: TensorInfo, sample: HashArray, dtype: torch.dtype) -> tuple[bool, int, int]:
        """Sort key: paired by name first, then most rows in common, then fewest rows that were found before."""
        shared, found = view.count(sample, dtype)
        return self.hints.get(view.name) != tensor.name, -shared, found

    def _hash_tensor(self, tensor: TensorInfo, dtype: torch.dtype) -> HashArray:
        step = max(1, _CHUNK // tensor.columns)
        parts = (RowSlice(i, at, min(at + step, tensor.rows)) for i, at in enumerate(range(0, tensor.rows, step)))
        return np.concatenate([self._hash(self.reader.weights(tensor, part).to(dtype)) for part in parts])

    def _hash_rows(self, rows: torch.Tensor, dtype: torch.dtype) -> HashArray:
        step = max(1, _CHUNK // rows.shape[1])
        return np.concatenate([self._hash(rows[at : at + step].to("cpu", dtype)) for at in range(0, rows.shape[0], step)])

    def _hash(self, rows: torch.Tensor) -> HashArray:
        """One hash per row of a matrix."""
        raw = rows.contiguous().view(torch.uint8).reshape(-1).numpy().data
        size = len(raw) // rows.shape[0]
        new, key = hashlib.blake2b, self.key
        digests = [new(raw[at : at + size], digest_size=8, key=key).digest() for at in range(0, len(raw), size)]
        return np.frombuffer(b"".join(digests), dtype=np.uint64)

    def _result(self) -> RowMap:
        rows = {name: tensor.rows for name, tensor in self.model.tensors.items()}
        return RowMap(
            {name: TensorRows(name, rows[name], tuple(sources)) for name, sources in self.sources.items() if sources},
            tuple(Unmapped(name, len(f), int(f.sum())) for name, f in self.found.items() if not f.all()),
            tuple(Unmapped(name, len(f), int((~f).sum())) for name, f in self.free.items() if f.any()),
        )


def _type(tensor: TensorInfo) -> torch.dtype:
    return FLOAT_TYPES[tensor.ggml_type]


def _common(parameter: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """The type both are compared in: the narrower one; the stored one if neither holds the other."""
    return parameter if stored is torch.float32 else stored


def _name_hints(model: GgufModel, parameters: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Parameter -> GGUF tensor by gguf's name map, where it knows the architecture: used to break ties only."""
    targets = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    arch = targets.get(model.architecture)
    if arch is None:
        return {}
    blocks = model.first.get(f"{model.architecture}.block_count", 0)
    names = gguf.get_tensor_name_map(arch, blocks if isinstance(blocks, int) and 0 < blocks <= 512 else 0)
    found = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in parameters}
    return {name: target for name, target in found.items() if target}
