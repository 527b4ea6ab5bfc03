"""`--dry-run`: what llama.cpp would do to each tensor, how large the result is, and what could be protected. Writes nothing.

llama.cpp plans from a GGUF. For a Hugging Face folder an outline of the base (header without data, a sparse file) is made in
the system's temporary folder and removed again.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from convert.bnb_layout import stored_bytes
from convert.cores import available_cores
from convert.gguf_file import GgufModel, TensorInfo, stored_bytes
from convert.hf.base import write_base_outline
from convert.hf.checkpoint import PLAIN_DTYPES
from convert.quantizer import Fallback, quantize
from convert.source import open_base, resolve_source
from convert.tensor_io import FLOAT_TYPES, SLICE_WEIGHTS
from qguard_edge.conversion.naming import output_path
from qguard_edge.conversion.request import ConvertRequest
from qguard_edge.learned.memory import TORCH_BYTES, LearningCost, dry_cost, size_of
from quant_grids import GRIDS
from quant_grids.errors import UnsupportedError
from quant_grids.ggml_type import type_named

SLICE_ARRAYS = 40  # f32 arrays of a slice's size that planning a slice touches at most, measured


@dataclass(frozen=True)
class DryTensor:
    """One tensor's fate.

    Attributes:
        name: tensor name.
        shape: as in ggml, fastest first.
        source_type: type in the base.
        target_type: type in the output.
        n_bytes: size in the output.
        protection: "scalar" or "lattice" (kind of grid), "float" (not quantized), or "none".
        fallback: set when the shape does not allow the type that was wanted.
    """

    name: str
    shape: tuple[int, ...]
    source_type: str
    target_type: str
    n_bytes: int
    protection: str
    fallback: Fallback | None


@dataclass(frozen=True)
class DryRun:
    """What a conversion would do.

    Attributes:
        outfile: the name the output would get.
        tensors: one entry each, in llama.cpp's order.
        base_bytes: size of the base's tensors.
        out_bytes: size of the output's tensors.
        memory_bytes: estimated peak resident size of the larger of the two processes.
        warnings: one sentence each.
        learning: what a learned defense will cost.
    """

    outfile: Path
    tensors: tuple[DryTensor, ...]
    base_bytes: int
    out_bytes: int
    memory_bytes: int
    warnings: tuple[str, ...]
    learning: LearningCost | None = None


def dry_run(request: ConvertRequest) -> DryRun:
    """Plan a conversion without writing an output.

    Raises:
        QGuardError: the same errors that the conversion would meet before it quantizes.
    """
    request.options.check()
    request.defense.check()
    source = resolve_source(request.model, request.revision)
    with tempfile.TemporaryDirectory() as folder:
        if source.is_gguf:
            base = open_base(source.path, request.options.allow_requantize)
        else:
            outline = Path(folder) / "base.gguf"
            if request.converter is not None:
                raise UnsupportedError("--dry-run cannot plan with --converter: make the base first with --to bf16")
            write_base_outline(source.path, outline, base_type=request.base_type, pre=request.pre, name=source.name)
            base = GgufModel(outline)
        options = replace(request.options, imatrix=None)
        report = quantize(base.path, Path(folder) / "unused.gguf", options, dry_run=True)
        fallbacks = {fallback.tensor: fallback for fallback in report.fallbacks}
        tensors = tuple(
            _plan(base.tensors[planned.name], planned.target_type, fallbacks.get(planned.name)) for planned in report.tensors
        )
        base_bytes = sum(tensor.n_bytes for tensor in base.tensors.values())
    warnings = list(report.warnings)
    if request.options.file_type.needs_imatrix and request.options.imatrix is None:
        warnings.append(f"{request.options.file_type.name} needs an importance matrix: pass --imatrix FILE")
    learning = dry_cost(request, size_of((tensor.name, tensor.shape) for tensor in tensors), warnings)
    return DryRun(
        outfile=output_path(request, source),
        tensors=tensors,
        base_bytes=base_bytes,
        out_bytes=sum(tensor.n_bytes for tensor in tensors),
        memory_bytes=max(_memory(tensors, request.options.threads), learning.memory_bytes if learning else 0),
        warnings=tuple(warnings),
        learning=learning,
    )


def _plan(tensor: TensorInfo, target: str, fallback: Fallback | None) -> DryTensor:
    target_type = type_named(target)
    protection = "float"
    if target_type not in FLOAT_TYPES:
        protection = GRIDS[target_type].kind if target_type in GRIDS else "none"
    return DryTensor(
        name=tensor.name,
        shape=tensor.shape,
        source_type=tensor.ggml_type.name,
        target_type=target,
        n_bytes=stored_bytes(target_type, tensor.shape, tensor.name),
        protection=protection,
        fallback=fallback,
    )


def _memory(tensors: tuple[DryTensor, ...], threads: int) -> int:
    """Peak of llama.cpp (the largest tensor as source, f32 and output) or of planning (a few slices per thread)."""
    largest = 0
    for tensor in tensors:
        weights = 1
        for size in tensor.shape:
            weights *= size
        largest = max(largest, weights * (4 + 4) + tensor.n_bytes)
    planning = TORCH_BYTES + (threads or available_cores()) * SLICE_ARRAYS * 4 * SLICE_WEIGHTS
    return max(largest, planning)


@dataclass(frozen=True)
class DryFolderTensor:
    """One tensor's fate, for `--dry-run`.

    Attributes:
        name: in the checkpoint.
        shape: outermost dimension first.
        source_type: type in the checkpoint.
        target_type: type in the output.
        n_bytes: in the output.
        protection: "scalar", or "float" where nothing is rounded.
    """

    name: str
    shape: tuple[int, ...]
    source_type: str
    target_type: str
    n_bytes: int
    protection: str


@dataclass(frozen=True)
class DryFolder:
    """What a conversion would do.

    Attributes:
        outfile: the name that the folder would get.
        tensors: one entry each.
        base_bytes: tensor data read.
        out_bytes: tensor data written.
        warnings: one sentence each.
        learning: what a learned defense will cost.
    """

    outfile: Path
    tensors: tuple[DryFolderTensor, ...]
    base_bytes: int
    out_bytes: int
    warnings: tuple[str, ...]
    learning: LearningCost | None = None


def dry_folder(request: FolderRequest) -> DryFolder:
    """Plan a conversion without writing anything.

    Raises:
        QGuardError: what the conversion would meet before it reads a weight.
    """
    plan = plan_folder(request)
    tensors = []
    for tensor in plan.checkpoint.tensors.values():
        rounded = plan.module_of(tensor) is not None
        floating = tensor.dtype in PLAIN_DTYPES
        kept = request.base_type.upper() if request.base_type and floating else tensor.dtype
        size = tensor.elements * _SIZES.get(kept, 1)
        target = kept
        if rounded and request.to != "hf":
            target = request.to.upper()
            size = stored_bytes(request.to, (tensor.shape[0], tensor.shape[1]), request.double_quant)
        protection = "scalar" if rounded else "float"
        tensors.append(DryFolderTensor(tensor.name, tensor.shape, tensor.dtype, target, size, protection))
    base = sum(source_bytes(tensor) for tensor in plan.checkpoint.tensors.values())
    warnings = list(plan.warnings)
    learning = dry_cost(request, plan.size(), warnings)
    out = sum(tensor.n_bytes for tensor in tensors)
    return DryFolder(plan.outfile, tuple(tensors), base, out, tuple(warnings), learning)
