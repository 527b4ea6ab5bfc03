"""The plan: walk over the quantized tensors of a plain file and let a defense choose each weight's rounding.

Per tensor: cut it into slices of whole rows; for each slice read the plain blocks and the full-precision rows, list the flips,
let the defense choose, and hand the changed blocks to a sink (the patch writer). Slices run on a pool of threads with one
torch thread each; which thread runs a slice changes nothing in the result. Memory is a few slices per thread, whatever the
size of the model.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from convert.child import resident_bytes
from convert.cores import available_cores
from convert.gguf_file import GgufFile, GgufModel, TensorInfo, same_shape
from convert.imatrix_file import Imatrix
from convert.tensor_io import FLOAT_TYPES, RowSlice, TensorReader, open_reader, row_slices, single_threaded_torch
from qguard_edge.defenses.base import Defense, Inputs, SliceKey
from qguard_edge.progress import Progress
from qguard_edge.rounding.by_inputs import MatrixWork, Rounding, in_order_of_inputs, round_matrices
from qguard_edge.rounding.choose import choose_rounding
from qguard_edge.rounding.room import Room, room_for
from quant_grids import GRIDS, Flips, Outcome
from quant_grids.errors import FormatError, UnsupportedError
from quant_grids.ggml_type import GgmlType

CUDA_SLICE_WEIGHTS = 1 << 24
CPU = torch.device("cpu")
Sink = Callable[[TensorInfo, int, Tensor], None]
"""Called with (tensor, first row, new blocks uint8 `[n, type_size]`), from several threads."""


@dataclass(frozen=True)
class TensorRounding:
    """What the defense did to one tensor.

    Attributes:
        name: the tensor.
        ggml_type: its type.
        n_weights: in it.
        outcome: what the chosen codes change.
        seconds: wall time.
        bits: entropy of the random choices, where the rule measures it.
        differing: codes that another seed is expected to choose otherwise, where the rule measures it.
    """

    name: str
    ggml_type: GgmlType
    n_weights: int
    outcome: Outcome
    seconds: float
    bits: float = 0.0
    differing: float = 0.0


class HasOutcome(Protocol):
    """Anything whose rounding was measured."""

    @property
    def outcome(self) -> Outcome:
        """What the chosen codes change."""


def total_outcome(roundings: "Sequence[HasOutcome]") -> Outcome:
    """Sums over all tensors."""
    return Outcome.sum(rounding.outcome for rounding in roundings)


@dataclass(frozen=True)
class Coverage:
    """Which tensors of a plain file a defense can reach.

    Attributes:
        protected: quantized from full precision, and their type has a grid.
        unprotected: quantized, but without a grid.
        untouched: stored as floats, or copied from a base that was quantized already.
    """

    protected: tuple[TensorInfo, ...]
    unprotected: tuple[TensorInfo, ...]
    untouched: tuple[TensorInfo, ...]

    @property
    def protected_share(self) -> float:
        """Share of the quantized weights that are protected."""
        done = sum(tensor.n_weights for tensor in self.protected)
        return done / (done + sum(tensor.n_weights for tensor in self.unprotected)) if done else 0.0


def coverage_of(base: GgufModel, plain: GgufFile) -> Coverage:
    """Sort the plain file's tensors by what a defense can do for them.

    Raises:
        FormatError: a tensor is missing from the base or has another shape there.
    """
    protected, unprotected, untouched = [], [], []
    for tensor in plain.tensors.values():
        source = base.tensors.get(tensor.name)
        if source is None or not same_shape(source.shape, tensor.shape):
            found = "is not in" if source is None else f"has the shape {list(source.shape)} in"
            raise FormatError(f"{tensor.name!r} of {plain.path.name} {found} {base.path.name}: these do not belong together")
        if tensor.ggml_type in FLOAT_TYPES or tensor.ggml_type == source.ggml_type:
            untouched.append(tensor)
        elif tensor.ggml_type in GRIDS:
            protected.append(tensor)
        else:
            unprotected.append(tensor)
    return Coverage(tuple(protected), tuple(unprotected), tuple(untouched))


def require_coverage(coverage: Coverage, allow_unprotected: bool) -> None:
    """Refuse tensors whose rounding cannot be chosen, unless the user accepts them.

    Raises:
        UnsupportedError: naming the first of them.
    """
    if coverage.unprotected and not allow_unprotected:
        first = coverage.unprotected[0]
        raise UnsupportedError(
            f"{len(coverage.unprotected)} tensors cannot be protected, the first is {first.name!r} of type "
            f"{first.ggml_type.name}, which has no grid; choose another type or pass --allow-unprotected"
        )


@dataclass(frozen=True)
class WalkOptions:
    """How the tensors of a file are gone through.

    Attributes:
        seed: of all random numbers.
        threads: slices in work at a time, 0 for one per core.
        device: where the arithmetic runs.
        imatrix: weights of the squared error that flips may add.
        inputs: Gram matrices of the matrices' inputs, for a rule that wants them.
        max_memory: bytes of this process, for a rule that wants inputs; None: no limit.
    """

    seed: int
    threads: int = 0
    device: torch.device = CPU
    imatrix: Imatrix | None = None
    inputs: Inputs | None = None
    max_memory: int | None = None

    def room(self, columns: int) -> Room:
        """What the walk by inputs may hold at a time, for matrices of up to so many columns.

        On a GPU one thread rounds while the other prepares the next matrix.

        Raises:
            RoomError: too little is left.
        """
        if self.device.type == "cuda":
            return Room(2)
        budget = None if self.max_memory is None else self.max_memory - resident_bytes("RssAnon")
        return room_for(columns, self.threads or available_cores(), budget)


def harden(
    base: GgufModel,
    plain: GgufFile,
    tensors: tuple[TensorInfo, ...],
    defense: Defense[Any],
    options: WalkOptions,
    *,
    sink: Sink,
    progress: Progress | None = None,
) -> tuple[TensorRounding, ...]:
    """Choose the rounding of every given tensor and hand the new blocks to `sink`.

    Args:
        base: full precision.
        plain: what llama.cpp wrote.
        tensors: of the plain file, each with a grid.
        defense: the rule.
        options: seed, threads, device, importance matrix.
        sink: receives the new rows of each slice.
        progress: told the number of weights done.

    Returns:
        One record per tensor, in the order given.

    Raises:
        UnsupportedError: the rule wants to know the inputs, and they are not given.
        RoomError: it does not fit into the memory that is allowed.
    """
    if defense.wants_inputs and options.inputs is None:
        raise UnsupportedError(
            f"--defense {defense.options.name} needs to know the inputs of each matrix, and none were measured; use --defense "
            "ortho"
        )
    workers = 1 if options.device.type == "cuda" else options.threads or available_cores()
    room = options.room(max((tensor.columns for tensor in tensors), default=1)) if defense.wants_inputs else Room(workers)
    paths = [shard.path for shard in base.shards]
    results = []
    with open_reader(plain.path, *paths) as reader, single_threaded_torch(), ThreadPoolExecutor(room.workers) as pool:
        works = [
            _TensorWork(reader, base.tensors[tensor.name], tensor, defense, options, _columns(options.imatrix, tensor))
            for tensor in tensors
        ]
        walk = (
            _by_inputs(works, pool, sink, room) if defense.wants_inputs else (_harden_tensor(w, pool, sink) for w in works)
        )
        for tensor, result in zip(tensors, walk, strict=True):
            results.append(result)
            if progress:
                progress.advance(tensor.n_weights, tensor.name)
    return tuple(results)


def _columns(imatrix: Imatrix | None, tensor: TensorInfo) -> Mapping[int, Tensor]:
    """Per expert, f32 `[columns]` weights of the squared error with mean 1; empty without an importance matrix."""
    experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
    weights = imatrix.for_tensor(tensor.name, tensor.columns, experts) if imatrix else None
    if weights is None:
        return {}
    table = torch.from_numpy(weights.copy())
    table /= table.mean(dim=1, keepdim=True).clamp_(min=1e-30)
    return dict(enumerate(table))


@dataclass(frozen=True)
class _TensorWork:
    """Everything a thread needs to work on a slice of one tensor."""

    reader: TensorReader
    base: TensorInfo
    plain: TensorInfo
    defense: Defense[Any]
    options: WalkOptions
    importance: Mapping[int, Tensor]

    def slices(self) -> list[RowSlice]:
        """Slices of whole rows; the same on every device of a kind."""
        if self.options.device.type == "cuda":
            return row_slices(self.plain, CUDA_SLICE_WEIGHTS)
        return row_slices(self.plain)

    def key(self, part: RowSlice) -> SliceKey:
        return SliceKey(self.options.seed, self.plain.name, part.index, part.start)

    def rows(self, part: RowSlice) -> tuple[Tensor, Tensor]:
        """Plain blocks and full-precision weights of some rows."""
        device = self.options.device
        return self.reader.blocks(self.plain, part).to(device), self.reader.weights(self.base, part).to(device)

    def matrices(self, sink: Sink) -> list[MatrixWork]:
        """The tensor as matrices: one, or one per expert."""
        experts = math.prod(self.plain.shape[2:])
        each = self.plain.rows // experts
        return [
            MatrixWork(
                name=self.plain.name,
                expert=expert,
                grid=GRIDS[self.plain.ggml_type],
                columns=self.plain.columns,
                first=expert * each,
                rows=each,
                read=self.rows,
                key=self.key,
                sink=lambda part, changed: sink(self.plain, part.start, changed),
            )
            for expert in range(experts)
        ]

    def flips(self, part: RowSlice) -> tuple[Tensor, Flips]:
        """The plain blocks and the flips they offer."""
        blocks = self.reader.blocks(self.plain, part).to(self.options.device)
        weights = self.reader.weights(self.base, part).to(self.options.device)
        flips = GRIDS[self.plain.ggml_type].flips(blocks, weights, self._importance(part))
        return blocks, flips

    def _importance(self, part: RowSlice) -> Tensor | None:
        """f32 `[rows, columns]`: each row gets its expert's weights."""
        if not self.importance:
            return None
        per_expert = self.plain.shape[1]
        experts = torch.arange(part.start, part.stop) // per_expert
        return torch.stack([self.importance[i] for i in range(len(self.importance))])[experts].to(self.options.device)


def _harden_tensor(work: _TensorWork, pool: ThreadPoolExecutor, sink: Sink) -> TensorRounding:
    started = time.perf_counter()
    total = choose_rounding(
        GRIDS[work.plain.ggml_type],
        work.defense,
        work.slices(),
        flips_of=work.flips,
        key_of=work.key,
        sink=lambda part, changed: sink(work.plain, part.start, changed),
        pool=pool,
    )
    seconds = time.perf_counter() - started
    return TensorRounding(work.plain.name, work.plain.ggml_type, work.plain.n_weights, total, seconds)


def _by_inputs(works: Sequence[_TensorWork], pool: ThreadPoolExecutor, sink: Sink, room: Room) -> Iterator[TensorRounding]:
    """Round tensors by a rule that knows their inputs."""
    if not works:
        return
    options, matrices = works[0].options, [work.matrices(sink) for work in works]
    flat = in_order_of_inputs([matrix for some in matrices for matrix in some], options.inputs)
    rounded = zip(flat, round_matrices(flat, works[0].defense, options.inputs, pool, options.device, room), strict=True)
    done: dict[str, dict[int, Rounding]] = {work.plain.name: {} for work in works}
    for work, mine in zip(works, matrices, strict=True):
        tensor = work.plain
        while len(done[tensor.name]) < len(mine):
            matrix, one = next(rounded)
            done[matrix.name][matrix.expert] = one
        found = [done[tensor.name].pop(matrix.expert) for matrix in mine]
        yield TensorRounding(
            tensor.name,
            tensor.ggml_type,
            tensor.n_weights,
            total_outcome(found),
            sum(one.seconds for one in found),
            sum(one.bits for one in found),
            sum(one.differing for one in found),
        )
