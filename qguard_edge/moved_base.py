"""Move the weights of a base GGUF so that the unmodified llama-quantize rounds them to hardened codes.

The papers' own setting: nobody touches the quantizer, the full-precision file changes. Whoever publishes the base and leaves
the quantizing to others can harden it this way. The counterpart for bitsandbytes is `qguard_edge.moved_weights`.

How
---
1. Convert as ever: llama.cpp's reference, and the codes that the defense chose.
2. A weight whose code was changed moves to the nearest point of the new code's cell (`quant_grids.cells`), a margin inside it;
   all others stay, and so do the extreme weights of each sub-block, which set its scale: their flips are given up.
3. Let llama.cpp quantize the result, and count what came out.

Step 3 is needed because only the legacy types (Q4_0 ... Q8_0) take their scales from the largest weights. There every code is
reached. The k-quants and IQ4 types search for the scales with the smallest error, and moved weights change what they find: what
remains of the chosen rounding is measured, not promised. The measure that counts is the alignment of the file that llama.cpp
makes; new scales alone turn the rounding error away from the old one.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from convert.atomic import atomic_path, check_writable
from convert.cores import available_cores
from convert.float_copy import FloatCopy
from convert.gguf_file import GgufFile, GgufModel, TensorInfo
from convert.patch import sha256_of
from convert.quantizer import quantize
from convert.tensor_io import RowSlice, TensorReader, open_reader, row_slices, single_threaded_torch
from qguard_edge.conversion import ConvertRequest
from qguard_edge.defenses.options import NoiseOptions, QVecOptions
from qguard_edge.guard import Guard
from qguard_edge.learned.checkpoint import begin_attempt
from qguard_edge.load_check import LoadCheck, load_check
from qguard_edge.pipeline import Conversion, scanned_and_fitted
from qguard_edge.preparation import check_output, make_base, reference_path, work_folder
from qguard_edge.progress import Clock, NoProgress, Progress
from qguard_edge.rounding import TensorRounding, coverage_of, measured_outcome
from qguard_edge.source import resolve_source
from quant_grids import GRIDS, Outcome
from quant_grids.base import ScalarGrid
from quant_grids.cells import SEARCHED_TYPES, cell_of, extent, sub_block_setters
from quant_grids.errors import UnsupportedError
from quant_grids.ggml_type import GgmlType

HALF_EPSILON = 2.0**-11
MARGIN = 0.02
"""Share of the cell that a moved weight keeps from its edge."""
SEARCHED_MARGIN = 0.1
"""The same for types whose scales are searched for. A trained Llama with 2.9 M weights, ortho, what llama.cpp made of it:

    margin  Q4_K: flips reached, alignment, added error   Q6_K               Q3_K_M
    0.02    60%  0.02  +18%                               76%  0.05  +39%    74%  0.10  +42%
    0.1     80% -0.08  +40%                               90% -0.04  +53%    91% -0.03  +55%
    0.25    98% -0.09  +71%                               98% -0.03  +62%    99% -0.03  +60%

Holding the sub-blocks with the largest scale as well left alignments of 0.11 to 0.26.
"""


@dataclass(frozen=True)
class MovedTensor:
    """What became of one tensor.

    Attributes:
        name: the tensor.
        ggml_type: what llama.cpp quantizes it to.
        n_weights: in it.
        n_chosen: codes that the defense changed.
        n_moved: weights that were moved for it; the others are extremes that set a scale.
        codes: weights that have the chosen code after llama.cpp quantized the moved base.
        reached: of the moved weights, how many of them.
        outcome: what llama.cpp's file from the moved base does to the rounding error of its file from the original.
    """

    name: str
    ggml_type: GgmlType
    n_weights: int
    n_chosen: int
    n_moved: int
    codes: int
    reached: int
    outcome: Outcome


@dataclass(frozen=True)
class MovedReport:
    """What was done.

    Attributes:
        outfile: the moved base.
        request: what was asked for.
        seed: that was used.
        tensors: per protected tensor.
        chosen: what the defense chose, before it met the quantizer.
        hashes: SHA-256 of `base` and `output`.
        seconds: wall time of each stage.
        warnings: one sentence each.
        loaded: the load check's answer.
    """

    outfile: Path
    request: ConvertRequest
    seed: int
    tensors: tuple[MovedTensor, ...]
    chosen: tuple[TensorRounding, ...]
    hashes: dict[str, str]
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    loaded: LoadCheck | None


def convert_to_moved_base(
    request: ConvertRequest, progress: Progress | None = None, guard: Guard | None = None
) -> MovedReport:
    """Write a full-precision GGUF whose quantization by llama.cpp is hardened; on any error nothing is left.

    Args:
        request: as for `convert_model`; `options.file_type` is the type that the base is made for, `outfile` the base
            (`{ftype}` and `{FTYPE}` are replaced; default `NAME-for-FTYPE.gguf` here).
        progress: told about each stage.
        guard: asked about the model first, as by `convert_model`.

    Raises:
        UnsupportedError: a type that shares codes between weights, or none that rounds.
        QGuardError: as `convert_model`.
    """
    progress = progress or NoProgress()
    request, warnings = _check(request)
    request.options.check()
    request.defense.check()
    request.calibration.check()
    source = resolve_source(request.model, request.revision)
    name = request.options.file_type.name
    template = request.outfile or f"{source.name}-for-{{FTYPE}}.gguf"
    outfile = Path(template.replace("{ftype}", name.lower()).replace("{FTYPE}", name)).expanduser()
    check_writable(outfile)
    check_output(outfile, source, replace(request, keep_reference=False))
    clock = Clock()
    with work_folder(outfile.parent) as work:
        with clock.stage("base"):
            base = make_base(source, request, work, progress, warnings)
        request = scanned_and_fitted(request, base, guard, clock, warnings)
        attempt = begin_attempt(outfile, request.defense, request.seed)
        with clock.stage("choose codes"):
            made = Conversion(
                request=replace(request, keep_reference=True, check_loads=False),
                source=source,
                base=base,
                outfile=work / "chosen.gguf",
                work=work,
                attempt=attempt,
                clock=Clock(),
                progress=progress,
                warnings=warnings,
                guard=guard,
            ).run()
        move = _Move(base, GgufFile(reference_path(made.outfile)), GgufFile(made.outfile), request.options.threads)
        with atomic_path(outfile) as moved:
            with clock.stage("move"):
                progress.stage("Moving the weights", sum(t.n_weights for t in move.tensors), "weights")
                counts = move.write(moved, progress)
            with clock.stage("quantize again"):
                progress.stage(f"Asking llama.cpp for {name}", len(move.reference.tensors), "tensors")
                again = work / "again.gguf"
                quantize(moved, again, request.options, progress=lambda _i, _n, tensor: progress.advance(1, tensor))
            with clock.stage("count"):
                progress.stage("Counting the codes", sum(t.n_weights for t in move.tensors), "weights")
                tensors = move.count(GgufFile(again), counts, progress)
            loaded = None
            if request.check_loads:
                with clock.stage("load check"):
                    loaded = load_check(moved, threads=request.options.threads)
            hashes = {"base": made.hashes["base"], "output": sha256_of([moved])}
    attempt.finish()
    return MovedReport(
        outfile,
        request,
        attempt.seed,
        tensors,
        made.roundings,
        hashes,
        dict(clock.seconds),
        (*made.warnings, *_doubts(tensors)),
        loaded,
    )


def _check(request: ConvertRequest) -> tuple[ConvertRequest, list[str]]:
    """The request with a defense that chooses codes, and what to say about it."""
    file_type, defense = request.options.file_type, request.defense
    if file_type.base:
        raise UnsupportedError(f"--target {file_type.name}: nothing is rounded there; choose a quantized type such as q4_0")
    if isinstance(defense, NoiseOptions | QVecOptions) and defense.mode == "requantize":
        said = f"{defense.name} keeps the scales here (its fixed-grid mode): codes are to be reached on the reference's grid"
        return replace(request, defense=replace(defense, mode="fixed-grid")), [said]
    return request, []


def _doubts(tensors: Sequence[MovedTensor]) -> tuple[str, ...]:
    """Says which types llama.cpp fits scales to, so that the chosen codes are not all reached."""
    searched = sorted({tensor.ggml_type.name for tensor in tensors if tensor.ggml_type in SEARCHED_TYPES})
    if not searched:
        return ()
    moved = sum(t.n_moved for t in tensors if t.ggml_type in SEARCHED_TYPES)
    reached = sum(t.reached for t in tensors if t.ggml_type in SEARCHED_TYPES)
    return (
        f"llama.cpp searches for the scales of {', '.join(searched)} and finds others for moved weights: "
        f"{reached / moved if moved else 1.0:.0%} of the chosen flips were reached; convert to the type itself to have all",
    )


@dataclass(frozen=True)
class _Counts:
    """Of one tensor: codes the defense changed, weights moved."""

    chosen: int
    moved: int


class _Move:
    """The files at hand, and the walk over their tensors."""

    def __init__(self, base: GgufModel, reference: GgufFile, chosen: GgufFile, threads: int) -> None:
        self.base, self.reference, self.chosen = base, reference, chosen
        self.workers = threads or available_cores()
        self.tensors = coverage_of(base, reference).protected
        for tensor in self.tensors:
            if not isinstance(GRIDS[tensor.ggml_type], ScalarGrid):
                raise UnsupportedError(
                    f"{tensor.name!r} becomes {tensor.ggml_type.name}, whose codes are shared by several weights: no weight has "
                    "a cell of its own to move to; choose a type such as q4_0, q8_0 or q4_k"
                )

    def _paths(self) -> list[Path]:
        return [self.reference.path, self.chosen.path, *(shard.path for shard in self.base.shards)]

    def write(self, path: Path, progress: Progress) -> dict[str, _Counts]:
        """Write the moved base; F32 where weights move, for the moves are small against the steps of bf16."""
        counts: dict[str, _Counts] = {}
        copy = FloatCopy(self.base, path, {tensor.name for tensor in self.tensors})
        try:
            with open_reader(*self._paths()) as reader, single_threaded_torch(), ThreadPoolExecutor(self.workers) as pool:
                for tensor in self.tensors:

                    def move(part: RowSlice, tensor: TensorInfo = tensor) -> tuple[int, int]:
                        with torch.inference_mode():
                            weights, chosen, moved = self._moved(reader, tensor, part)
                            copy.write_rows(self.base.tensors[tensor.name], part.start, weights)
                            return int(chosen.sum()), int(moved.sum())

                    parts = list(pool.map(move, row_slices(tensor)))
                    counts[tensor.name] = _Counts(sum(a for a, _ in parts), sum(b for _, b in parts))
                    progress.advance(tensor.n_weights, tensor.name)
        finally:
            copy.close()
        return counts

    def _moved(self, reader: TensorReader, tensor: TensorInfo, part: RowSlice) -> tuple[Tensor, Tensor, Tensor]:
        """New weights f32 `[rows, columns]`; which codes the defense changed and which weights moved, bool, same shape."""
        weights = reader.weights(self.base.tensors[tensor.name], part)
        old = reader.blocks(tensor, part)
        new = reader.blocks(self.chosen.tensors[tensor.name], part)
        return move_into_cells(_scalar(tensor.ggml_type), old, new, weights)

    def count(self, again: GgufFile, counts: dict[str, _Counts], progress: Progress) -> tuple[MovedTensor, ...]:
        """Hold llama.cpp's file from the moved base against the plan."""
        results = []
        with (
            open_reader(again.path, *self._paths()) as reader,
            single_threaded_torch(),
            ThreadPoolExecutor(self.workers) as pool,
        ):
            for tensor in self.tensors:

                def measure(part: RowSlice, tensor: TensorInfo = tensor) -> tuple[int, int, Outcome]:
                    with torch.inference_mode():
                        return self._measure(reader, tensor, again.tensors[tensor.name], part)

                codes = reached = 0
                total = Outcome(0, 0.0, 0.0, 0.0)
                for one, other, outcome in pool.map(measure, row_slices(tensor)):
                    codes, reached, total = codes + one, reached + other, total + outcome
                done = counts[tensor.name]
                results.append(
                    MovedTensor(
                        tensor.name, tensor.ggml_type, tensor.n_weights, done.chosen, done.moved, codes, reached, total
                    )
                )
                progress.advance(tensor.n_weights, tensor.name)
        return tuple(results)

    def _measure(
        self, reader: TensorReader, tensor: TensorInfo, made: TensorInfo, part: RowSlice
    ) -> tuple[int, int, Outcome]:
        grid, blocks = _scalar(tensor.ggml_type), reader.blocks(made, part)
        wanted = grid.unpack(reader.blocks(self.chosen.tensors[tensor.name], part)).codes
        _, _, moved = self._moved(reader, tensor, part)
        same = (grid.unpack(blocks).codes == wanted).view(moved.shape)
        full = reader.weights(self.base.tensors[tensor.name], part)
        outcome = measured_outcome(grid, reader.blocks(tensor, part), blocks, full)
        return int(same.sum()), int((same & moved).sum()), outcome


def _scalar(ggml_type: GgmlType) -> ScalarGrid:
    grid = GRIDS[ggml_type]
    assert isinstance(grid, ScalarGrid)
    return grid


def move_into_cells(grid: ScalarGrid, old: Tensor, new: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move weights whose code was changed into the cells of their new codes.

    Args:
        grid: of the type.
        old: uint8 `[n_blocks, type_size]`, the reference.
        new: the same with other codes.
        weights: f32 `[rows, columns]`, what the reference was made from.

    Returns:
        The weights, moved; bool of the same shape: codes that were changed, weights that were moved.
    """
    before, after = grid.unpack(old), grid.unpack(new)
    sub = weights.reshape(-1, grid.sub_size)
    chosen = (before.codes != after.codes).view(sub.shape)
    _, low, high = cell_of(grid, after)
    share = SEARCHED_MARGIN if grid.ggml_type in SEARCHED_TYPES else MARGIN
    # The quantizer takes codes with a scale that is rounded to fp16 only when it is stored.
    margin = share * (high - low) + HALF_EPSILON * torch.maximum(low.abs(), high.abs())
    smallest, largest = extent(grid, before, sub)
    # Nobody may overtake the weights that set the scale.
    target = torch.minimum(torch.maximum(sub, low + margin), high - margin).clamp(smallest, largest)
    movable = chosen & ~sub_block_setters(grid, before, sub) & torch.isfinite(target)
    moved = torch.where(movable, target, sub)
    shape = weights.shape
    return moved.view(shape), chosen.view(shape), movable.view(shape)
