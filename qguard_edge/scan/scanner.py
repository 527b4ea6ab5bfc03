"""The walk over a model: every tensor once, slice by slice, with all static tests of a slice while it is in the cache.

Every weight is looked at for outliers and for numbers that are none. Positions are measured on about `BOX_WEIGHTS` weights of
each tensor, in up to `BOX_PIECES` runs of whole rows, evenly spread: with 1000 weights per place a peak of 1.5, the lowest that
is a finding, is 15 standard deviations away. An attacker who boxes a few rows only is missed; so is most of its payload.
Slices run on a pool of threads with one torch thread each; memory is a few slices per thread whatever the size of the model.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from convert.cores import available_cores
from convert.gguf_file import GgufFile, TensorInfo
from convert.tensor_io import FLOAT_TYPES, RowSlice, TensorReader, open_reader, row_slices, single_threaded_torch
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.scan import boxes, outliers, sanity
from qguard_edge.scan.boxes import Fingerprint
from qguard_edge.scan.findings import Finding, Severity, in_order
from qguard_edge.scan.limits import Limits, load_limits
from qguard_edge.scan.outliers import OutlierStats
from qguard_edge.scan.positions import SIGNIFICANT_BITS, closed_form, from_blocks, histogram
from qguard_edge.scan.results import Scan
from qguard_edge.scan.sanity import SanityStats
from qguard_edge.scan.tensors import ScanModel, is_matrix
from quant_grids import GRIDS
from quant_grids.base import ScalarGrid

BOX_WEIGHTS = 1 << 17
BOX_PIECES = 4
ON_ITS_GRID = 0.5  # share of the weights on a level; clean ones have 0.02 of theirs there, and bf16 hides part of it
_BY_SIZE = ("nf4", "fp4", "q4_0", "q4_1", "q5_0", "q5_1", "int8", "q8_0")
DOUBTFUL_SHARE = 0.25  # of the matrices on a grid, from which box findings are at most suspicious
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SlicePart:
    """What one slice gave."""

    sanity: SanityStats
    outliers: OutlierStats
    precision: str
    positions: Mapping[str, Counts]


@dataclass
class TensorPart:
    """What the slices of one tensor add up to."""

    tensor: TensorInfo
    sanity: SanityStats = field(default_factory=SanityStats)
    outliers: OutlierStats = field(default_factory=OutlierStats)
    precision: str = "bf16"
    positions: dict[str, Counts] = field(default_factory=dict)

    def add(self, part: SlicePart) -> None:
        """Add a slice."""
        self.sanity += part.sanity
        self.outliers += part.outliers
        self.precision = max(self.precision, part.precision, key=SIGNIFICANT_BITS.__getitem__)
        for kind, counts in part.positions.items():
            self.positions[kind] = self.positions.get(kind, 0) + counts


class Walk:
    """Reads a model once.

    Args:
        model: what to read.
        types: closed-form types to compute positions for.
        plain_files: llama.cpp's quantized files of the model, for types that need one.
    """

    def __init__(self, model: ScanModel, types: Sequence[str], plain_files: Sequence[GgufFile] = ()) -> None:
        self.model, self.types, self.plain_files = model, types, plain_files

    def run(self, threads: int, progress: Progress) -> list[TensorPart]:
        """Every tensor's statistics, in the model's order."""
        progress.stage("Scanning", self.model.n_weights, "weights")
        files = [*self.model.files, *(file.path for file in self.plain_files)]
        made = {tensor.name: TensorPart(tensor) for tensor in self.model.tensors}
        with (
            open_reader(*files) as reader,
            single_threaded_torch(),
            ThreadPoolExecutor(threads or available_cores()) as pool,
        ):
            jobs = list(self._jobs())
            for (tensor, part, _), found in zip(jobs, pool.map(lambda job: self._slice(reader, *job), jobs), strict=True):
                made[tensor.name].add(found)
                progress.advance((part.stop - part.start) * tensor.columns, tensor.name)
        return list(made.values())

    def _jobs(self) -> Iterator[tuple[TensorInfo, RowSlice, int]]:
        """Every slice of every tensor, and on how many of its rows positions are measured."""
        for tensor in self.model.tensors:
            parts = row_slices(tensor)
            pieces = min(BOX_PIECES, len(parts))
            chosen = set(np.linspace(0, len(parts) - 1, pieces).astype(int).tolist())
            rows = max(1, BOX_WEIGHTS // pieces // tensor.columns)
            yield from ((tensor, part, rows if part.index in chosen else 0) for part in parts)

    def _slice(self, reader: TensorReader, tensor: TensorInfo, part: RowSlice, box_rows: int) -> SlicePart:
        with torch.inference_mode():
            weights = reader.weights(tensor, part)
            matrix = is_matrix(tensor)
            stats = sanity.measure(weights, matrix=matrix)
            precision = sanity.precision_of(tensor, weights)
            if not matrix or stats.broken:
                return SlicePart(stats, OutlierStats(), precision, {})
            positions: dict[str, Counts] = {}
            if box_rows:
                head = RowSlice(part.index, part.start, min(part.stop, part.start + box_rows))
                positions = dict(self._positions(reader, tensor, head, weights[: head.stop - head.start], precision))
            return SlicePart(stats, outliers.measure(weights), precision, positions)

    def _positions(
        self, reader: TensorReader, tensor: TensorInfo, part: RowSlice, weights: torch.Tensor, precision: str
    ) -> Iterator[tuple[str, Counts]]:
        for kind in self.types:
            place = closed_form(kind, tensor.columns)
            if place is not None:
                yield kind, histogram(place(weights, precision)).numpy()
        for file in self.plain_files:
            stored = file.tensors.get(tensor.name)
            grid = None if stored is None else GRIDS.get(stored.ggml_type)
            if stored is not None and isinstance(grid, ScalarGrid) and stored.shape == tensor.shape:
                blocks = reader.blocks(stored, part)
                yield stored.ggml_type.name.lower(), histogram(from_blocks(grid, blocks, weights, precision)).numpy()


def scan_model(
    model: ScanModel,
    types: Sequence[str] = (),
    plain_files: Sequence[GgufFile] = (),
    *,
    threads: int = 0,
    progress: Progress | None = None,
    limits: Limits | None = None,
) -> Scan:
    """Look for everything that needs no forward pass.

    Args:
        model: from `tensors.open_model`.
        types: closed-form types (`positions.CLOSED_FORM`) to look for box fingerprints of.
        plain_files: llama.cpp's files of the same model, whose types are looked at too.
        threads: 0 for one per core.
        progress: told the number of weights done.
        limits: what clean models show; the shipped ones by default.
    """
    started = time.perf_counter()
    limits = limits or load_limits()
    parts = Walk(model, types, plain_files).run(threads, progress or NoProgress())
    return judge(model, parts, types, plain_files, limits, time.perf_counter() - started)


def judge(
    model: ScanModel,
    parts: Sequence[TensorPart],
    types: Sequence[str],
    plain_files: Sequence[GgufFile],
    limits: Limits,
    seconds: float = 0.0,
) -> Scan:
    """Findings from the statistics of a walk."""
    matrices = [part for part in parts if is_matrix(part.tensor)]
    vectors = [(part.tensor, part.sanity) for part in parts if not is_matrix(part.tensor)]
    findings = sanity.judge([(part.tensor, part.sanity, part.precision) for part in matrices], vectors, limits)
    sound = [(part.tensor, part.outliers) for part in matrices if part.outliers.chunks]
    findings += outliers.judge(sound, limits)
    findings += _unprotected(plain_files)
    blotted = {name for finding in findings if finding.code == "QG201" for name in finding.tensors}
    coarse = on_grids(matrices, limits)
    # Where many matrices were on a grid, the others may carry its traces too (a fine-tuned dequantized model, cast to bf16).
    doubtful = len(coarse) >= DOUBTFUL_SHARE * len(matrices)
    findings += _trained_for(coarse)
    on_grid = {id(part) for part in coarse}
    usable = [
        part
        for part in matrices
        # Where outliers leave a few levels to the rest, positions show nothing about boxes.
        if part.tensor.name not in blotted and id(part) not in on_grid
    ]
    kinds = dict.fromkeys([*types, *(kind for part in matrices for kind in part.positions)])
    prints: dict[str, Fingerprint] = {}
    for kind in kinds:
        found, whole = _of_type(kind, usable, limits)
        if whole is None:
            findings.append(_untold(kind, [part for part in matrices if kind in part.positions], limits))
        else:
            prints[kind] = whole
            findings += [_capped(finding, doubtful) for finding in boxes.judge(kind, found, whole, limits)]
    shown = sorted(sound, key=lambda item: -item[1].share)[:10]
    return Scan(
        model=model.name,
        n_weights=model.n_weights,
        tensors=len(model.tensors),
        types=tuple(kinds),
        findings=in_order(findings),
        prints=prints,
        outliers=tuple((tensor.name, stats.share, stats.median_ratio) for tensor, stats in shown),
        seconds=seconds,
    )


@dataclass(frozen=True)
class Levels:
    """On whose levels the weights of a model lie that were on a grid before.

    Attributes:
        kind: the type, in lower case; of several the smallest, for the levels of Q4_0 are levels of Q5_0 as well.
        on_level: share of the weights, of those that count, that lie on a level.
        matrices: that were on a grid.
    """

    kind: str
    on_level: float
    matrices: int


def levels_of(coarse: Sequence[TensorPart]) -> Levels | None:
    """The type on whose levels weights lie that were on a grid before, if it is one of those looked at."""
    for kind in _BY_SIZE:
        counts = [part.positions[kind] for part in coarse if kind in part.positions]
        total = sum(int(found.sum()) for found in counts)
        on_level = sum(int(found[: boxes.ON_LEVEL].sum()) for found in counts) / max(total, 1)
        if total >= boxes.FEWEST and on_level >= ON_ITS_GRID:
            return Levels(kind, on_level, len(counts))
    return None


def on_grids(matrices: Sequence[TensorPart], limits: Limits) -> list[TensorPart]:
    """The matrices whose weights were on a grid before."""
    return [part for part in matrices if sanity.on_a_grid(part.sanity, part.precision, limits)]


def _trained_for(coarse: Sequence[TensorPart]) -> list[Finding]:
    """The finding that names the type of `levels_of`."""
    found = levels_of(coarse)
    if found is None:
        return []
    text = (
        f"{found.kind.upper()}: {found.on_level:.0%} of the weights of {found.matrices} matrices lie on a level: they were "
        f"trained for this type (QAT), or quantized to it; --to {found.kind} keeps them there, another type rounds them a "
        "second time"
    )
    return [Finding("QG106", Severity.INFO, text, found.kind, (), {"on_level": found.on_level})]


def _capped(finding: Finding, doubtful: bool) -> Finding:
    """The finding, at most suspicious in a model that was quantized before."""
    if doubtful and finding.severity is Severity.DANGEROUS:
        return replace(
            finding, severity=Severity.SUSPICIOUS, message=f"{finding.message}; it was quantized before, see QG106"
        )
    return finding


def _of_type(kind: str, parts: Sequence[TensorPart], limits: Limits) -> tuple[list[Fingerprint], Fingerprint | None]:
    measured = [part for part in parts if kind in part.positions and limits.knows(kind, part.precision)]
    found = []
    for part in measured:
        shape = boxes.shape_of(kind, limits, part.precision)
        made = boxes.fingerprint(part.tensor.name, part.positions[kind], shape)
        if made is not None:
            found.append(made)
    if not found:
        return found, None
    precisions = [part.precision for part in measured]
    usual = max(set(precisions), key=precisions.count)
    return found, boxes.pooled(kind, found, boxes.shape_of(kind, limits, usual))


def _untold(kind: str, parts: Sequence[TensorPart], limits: Limits) -> Finding:
    """No matrix could be judged for this type."""
    counted = max((int(part.positions[kind].sum()) for part in parts), default=0)
    why = "its row lengths do not fit the type" if not parts else f"at most {counted} weights of a matrix count"
    if any(sanity.on_a_grid(part.sanity, part.precision, limits) for part in parts):
        why = "the weights were on a grid before"
    elif parts and not any(limits.knows(kind, part.precision) for part in parts):
        why = f"there are no clean models of this type in {parts[0].precision} to compare with"
    return Finding("QG105", Severity.INFO, f"{kind.upper()}: box fingerprints could not be told: {why}", kind)


def _unprotected(plain_files: Sequence[GgufFile]) -> list[Finding]:
    """Tensors of a plain file whose type has no grid, or one without boxes."""
    findings = []
    for file in plain_files:
        quantized = [tensor for tensor in file.tensors.values() if tensor.ggml_type not in FLOAT_TYPES]
        bare = tuple(tensor.name for tensor in quantized if tensor.ggml_type not in GRIDS)
        if bare:
            text = f"{len(bare)} tensors get a type that no defense reaches, the first is {bare[0]!r}"
            findings.append(Finding("QG104", Severity.SUSPICIOUS, text, tensors=bare))
        lattice = {
            t.ggml_type.name for t in quantized if t.ggml_type in GRIDS and not isinstance(GRIDS[t.ggml_type], ScalarGrid)
        }
        findings += [
            Finding(
                "QG105",
                Severity.INFO,
                f"{name}: its codes are shared by several weights, so boxes do not show",
                name.lower(),
            )
            for name in sorted(lattice)
        ]
    return findings
