"""The plan: walk over the quantized tensors of a reference and let a defense choose each weight's rounding.

Per tensor: cut it into slices of whole rows; for each slice read the reference's blocks and the full-precision rows, ask the
grid for the flips and the defense for its choice, and hand the changed blocks to a sink (the patch writer). Slices run on a
pool of threads with one torch thread each; which thread runs a slice changes nothing in the result. Memory is a few
slices per thread, whatever the size of the model.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convert.cores import available_cores
from convert.gguf_file import GgufFile, GgufModel, TensorInfo
from convert.imatrix import Imatrix
from convert.tensor_io import FLOAT_TYPES, RowSlice, TensorReader, open_reader, row_slices, single_threaded_torch
from qguard_edge.defenses.base import Defense, Inputs, SliceKey
from qguard_edge.progress import Progress
from qguard_edge.rounding_by_inputs import Matrix, round_matrices
from quant_grids import GRIDS, Flips, Grid, Outcome
from quant_grids.errors import FormatError, QGuardError, UnsupportedError
from quant_grids.ggml_type import GgmlType

CUDA_SLICE_WEIGHTS = 1 << 24
Sink = Callable[[TensorInfo, int, Tensor], None]
"""Called with (tensor, first row, new blocks uint8 `[n, type_size]`), from several threads."""


class DeviceError(QGuardError):
    """The wanted device is not there."""


@dataclass(frozen=True)
class TensorRounding:
    """What the defense did to one tensor."""

    name: str
    ggml_type: GgmlType
    n_weights: int
    outcome: Outcome
    seconds: float
    bits: float = 0.0
    """Entropy of the random choices, where the rule measures it."""


@dataclass(frozen=True)
class Coverage:
    """Which tensors of a reference a defense can reach.

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


def coverage_of(base: GgufModel, reference: GgufFile) -> Coverage:
    """Sort the reference's tensors by what a defense can do for them.

    Raises:
        FormatError: a tensor is missing from the base or has another shape there.
    """
    protected, unprotected, untouched = [], [], []
    for tensor in reference.tensors.values():
        source = base.tensors.get(tensor.name)
        if source is None or source.shape != tensor.shape:
            found = "is not in" if source is None else f"has the shape {list(source.shape)} in"
            raise FormatError(
                f"{tensor.name!r} of {reference.path.name} {found} {base.path.name}: these do not belong together"
            )
        if tensor.ggml_type in FLOAT_TYPES or tensor.ggml_type == source.ggml_type:
            untouched.append(tensor)
        elif tensor.ggml_type in GRIDS:
            protected.append(tensor)
        else:
            unprotected.append(tensor)
    return Coverage(tuple(protected), tuple(unprotected), tuple(untouched))


def require_coverage(coverage: Coverage, allow_unprotected: bool) -> None:
    """Refuse tensors whose rounding nobody can choose, unless the user accepts them.

    Raises:
        UnsupportedError: naming the first of them.
    """
    if coverage.unprotected and not allow_unprotected:
        first = coverage.unprotected[0]
        raise UnsupportedError(
            f"{len(coverage.unprotected)} tensors cannot be protected, the first is {first.name!r} of type "
            f"{first.ggml_type.name}, which has no grid; choose another type or pass --allow-unprotected"
        )


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a torch device.

    Raises:
        DeviceError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: torch finds no CUDA device; use --device cpu or install a CUDA build of torch")
    if name not in ("cpu", "cuda"):
        raise DeviceError(f"--device {name!r}: choose auto, cpu or cuda")
    return torch.device(name)


def harden(
    base: GgufModel,
    reference: GgufFile,
    tensors: tuple[TensorInfo, ...],
    defense: Defense[Any],
    *,
    seed: int,
    sink: Sink,
    threads: int = 0,
    device: torch.device | None = None,
    imatrix: Imatrix | None = None,
    inputs: Inputs | None = None,
    progress: Progress | None = None,
) -> tuple[TensorRounding, ...]:
    """Choose the rounding of every given tensor and hand the new blocks to `sink`.

    Args:
        base: full precision.
        reference: what llama.cpp wrote.
        tensors: of the reference, each with a grid.
        defense: the rule.
        seed: of all random numbers.
        sink: receives the new rows of each slice.
        threads: slices in work at a time, 0 for one per core.
        device: where the arithmetic runs; default CPU.
        imatrix: weights of the squared error that flips may add.
        inputs: what is known of the inputs of the matrices, for a rule that wants it.
        progress: told the number of weights done.

    Returns:
        One record per tensor, in the order given.

    Raises:
        UnsupportedError: the rule wants to know the inputs, and they are not given.
    """
    if defense.wants_inputs and inputs is None:
        raise UnsupportedError(
            f"--defense {defense.options.name} needs to know what each matrix is fed, and nobody has looked; use --defense ortho"
        )
    device = device or torch.device("cpu")
    workers = 1 if device.type == "cuda" else threads or available_cores()
    paths = [shard.path for shard in base.shards]
    results = []
    with open_reader(reference.path, *paths) as reader, single_threaded_torch(), ThreadPoolExecutor(workers) as pool:
        works = [
            _TensorWork(reader, base.tensors[tensor.name], tensor, defense, seed, device, _columns(imatrix, tensor))
            for tensor in tensors
        ]
        walk = (
            _by_inputs(works, pool, sink, inputs) if defense.wants_inputs else (_harden_tensor(w, pool, sink) for w in works)
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
    reference: TensorInfo
    defense: Defense[Any]
    seed: int
    device: torch.device
    importance: Mapping[int, Tensor]

    def slices(self) -> list[RowSlice]:
        """Slices of whole rows; the same on every device of a kind."""
        if self.device.type == "cuda":
            return row_slices(self.reference, CUDA_SLICE_WEIGHTS)
        return row_slices(self.reference)

    def key(self, part: RowSlice) -> SliceKey:
        return SliceKey(self.seed, self.reference.name, part.index, part.start)

    def rows(self, part: RowSlice) -> tuple[Tensor, Tensor]:
        """The reference's blocks and the full-precision weights."""
        return self.reader.blocks(self.reference, part).to(self.device), self.reader.weights(self.base, part).to(self.device)

    def matrices(self, sink: Sink) -> list[Matrix]:
        """The tensor as matrices: one, or one per expert."""
        experts = math.prod(self.reference.shape[2:])
        each = self.reference.rows // experts
        return [
            Matrix(
                name=self.reference.name,
                expert=expert,
                grid=GRIDS[self.reference.ggml_type],
                columns=self.reference.columns,
                first=expert * each,
                rows=each,
                read=self.rows,
                key=self.key,
                sink=lambda part, changed: sink(self.reference, part.start, changed),
            )
            for expert in range(experts)
        ]

    def flips(self, part: RowSlice) -> tuple[Tensor, Flips]:
        """The reference's blocks and the flips they offer."""
        blocks, weights = self.rows(part)
        flips = GRIDS[self.reference.ggml_type].flips(blocks, weights, self._importance(part))
        return blocks, flips

    def _importance(self, part: RowSlice) -> Tensor | None:
        """f32 `[rows, columns]`: each row gets its expert's weights."""
        if not self.importance:
            return None
        per_expert = self.reference.shape[1]
        experts = torch.arange(part.start, part.stop) // per_expert
        return torch.stack([self.importance[i] for i in range(len(self.importance))])[experts].to(self.device)


def _harden_tensor(work: _TensorWork, pool: ThreadPoolExecutor, sink: Sink) -> TensorRounding:
    started = time.perf_counter()
    total = choose_rounding(
        GRIDS[work.reference.ggml_type],
        work.defense,
        work.slices(),
        flips_of=work.flips,
        key_of=work.key,
        sink=lambda part, changed: sink(work.reference, part.start, changed),
        pool=pool,
    )
    seconds = time.perf_counter() - started
    return TensorRounding(work.reference.name, work.reference.ggml_type, work.reference.n_weights, total, seconds)


def _by_inputs(
    works: Sequence[_TensorWork], pool: ThreadPoolExecutor, sink: Sink, inputs: Inputs | None
) -> Iterator[TensorRounding]:
    """Round tensors by a rule that knows their inputs."""
    matrices = [work.matrices(sink) for work in works]
    flat = [matrix for some in matrices for matrix in some]
    rounded = round_matrices(flat, works[0].defense, inputs, pool, works[0].device) if works else iter(())
    for work, mine in zip(works, matrices, strict=True):
        outcome, bits, seconds = Outcome(0, 0.0, 0.0, 0.0), 0.0, 0.0
        for _ in mine:
            found = next(rounded)
            outcome, bits, seconds = outcome + found.outcome, bits + found.bits, seconds + found.seconds
        tensor = work.reference
        yield TensorRounding(tensor.name, tensor.ggml_type, tensor.n_weights, outcome, seconds, bits)


def choose_rounding(
    grid: Grid,
    defense: Defense[Any],
    parts: Sequence[RowSlice],
    *,
    flips_of: Callable[[RowSlice], tuple[Tensor, Flips]],
    key_of: Callable[[RowSlice], SliceKey],
    sink: Callable[[RowSlice, Tensor], None],
    pool: ThreadPoolExecutor,
) -> Outcome:
    """Let a defense choose the rounding of one tensor, slice by slice, wherever its bytes come from.

    Args:
        grid: of the tensor's format.
        defense: the rule.
        parts: the tensor's slices.
        flips_of: the reference's blocks of a slice and the flips they offer; called once more per slice if the defense surveys.
        key_of: the slice's random numbers.
        sink: receives the new blocks of each slice, uint8 `[n, type_size]`.
        pool: the threads that slices are spread over.
    """
    defense = defense.on(grid)

    def survey(part: RowSlice) -> Any:
        with torch.inference_mode():
            _, flips = flips_of(part)
            return defense.survey(flips, key_of(part))

    def decide(part: RowSlice, share: Any) -> Outcome:
        with torch.inference_mode():
            blocks, flips = flips_of(part)
            chosen = defense.choose(flips, key_of(part), share)
            changed, outcome = grid.apply(blocks, flips, chosen)
            sink(part, changed)
            return outcome

    shares: list[Any] = [None] * len(parts)
    if defense.surveys:
        shares = list(defense.settle(list(pool.map(survey, parts))))
    total = Outcome(0, 0.0, 0.0, 0.0)
    for outcome in pool.map(decide, parts, shares):
        total = total + outcome
    return total


def measured_outcome(grid: Grid, before: Tensor, after: Tensor, weights: Tensor) -> Outcome:
    """What became of a slice, from the finished blocks: for changes that are not flips of one set of blocks.

    Args:
        grid: of the format.
        before: uint8 `[n_blocks, type_size]`, the reference.
        after: the same, changed.
        weights: f32 of as many elements as the blocks hold, full precision.
    """
    old = (grid.dequantize(before).view(weights.shape) - weights).view(-1)
    new = (grid.dequantize(after).view(weights.shape) - weights).view(-1)
    changed, _ = grid.changed_codes(before, after)
    return Outcome(changed, float(torch.dot(old, old)), float(torch.dot(old, new)), float(torch.dot(new, new)))
