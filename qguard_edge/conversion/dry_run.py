"""`--dry-run`: what would become of each tensor, how large the result is, and what could be protected. Writes nothing.

llama.cpp plans from a GGUF. For a Hugging Face folder an outline of the base (header without data, a sparse file) is made in
the system's temporary folder and removed again. A folder for bitsandbytes is planned from its own tensors.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from convert import bnb_layout
from convert.child import resident_bytes
from convert.cores import available_cores
from convert.gguf_file import GgufModel, TensorInfo, stored_bytes
from convert.hf.base import write_base_outline
from convert.hf.checkpoint import PLAIN_DTYPES, SourceTensor
from convert.quantizer import Fallback, check_tensor_types, quantize
from convert.scratch import scratch_folder
from convert.source import kept_types, open_base, published
from convert.tensor_io import FLOAT_TYPES, SLICE_WEIGHTS
from qguard_edge.conversion.feedback_cost import PARENT_BYTES, FeedbackCost, cost_of, model_of
from qguard_edge.conversion.honest_size import fallback_warning, require_no_fallback
from qguard_edge.conversion.machine import measured_rates
from qguard_edge.conversion.memory_limit import quantizer_bytes, require_memory
from qguard_edge.conversion.opened_folder import bytes_as
from qguard_edge.conversion.outputs.folder import FolderOutput
from qguard_edge.conversion.outputs.gguf import GgufOutput
from qguard_edge.conversion.request import ConversionRequest, FolderRequest, GgufRequest
from qguard_edge.defenses.options import FeedbackOptions, QuantGuardOptions
from qguard_edge.learned.memory import TORCH_BYTES, LearningCost, ModelSize, dry_cost, size_of
from quant_grids import GRIDS
from quant_grids.errors import UnsupportedError
from quant_grids.ggml_type import GgmlType, type_named

SLICE_ARRAYS = 40  # f32 arrays of a slice's size that planning a slice touches at most, measured


@dataclass(frozen=True)
class DryTensor:
    """What would become of one tensor.

    Attributes:
        name: tensor name.
        shape: as the output's format writes it (ggml: fastest first; a folder: outermost first).
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
    fallback: Fallback | None = None


@dataclass(frozen=True)
class DryRun:
    """What a conversion would do.

    Attributes:
        outfile: the name the output would get.
        tensors: one entry each, in the output's order.
        base_bytes: size of the base's tensors.
        out_bytes: size of the output's tensors.
        memory_bytes: estimated peak resident size of the largest process; with `prediction`, of all together.
        warnings: one sentence each.
        learning: what a learned defense will cost.
        prediction: what the default defense will take, stage by stage.
    """

    outfile: Path
    tensors: tuple[DryTensor, ...]
    base_bytes: int
    out_bytes: int
    memory_bytes: int
    warnings: tuple[str, ...]
    learning: LearningCost | None = None
    prediction: FeedbackCost | None = None


def dry_run(request: GgufRequest | FolderRequest) -> DryRun:
    """Plan a conversion without writing an output.

    Raises:
        QGuardError: the same errors that the conversion would meet before it quantizes.
    """
    request.check()
    return _dry_folder(request) if isinstance(request, FolderRequest) else _dry_gguf(request)


def _dry_gguf(request: GgufRequest) -> DryRun:
    output = GgufOutput(request)
    output.open()
    source = output.source
    with scratch_folder() as folder:
        if source.is_gguf:
            base = open_base(source.path, request.options.allow_requantize)
        else:
            outline = folder / "base.gguf"
            if request.converter is not None:
                raise UnsupportedError("--dry-run cannot plan with --converter: make the base first with --to bf16")
            write_base_outline(source.path, outline, base_type=request.base_type, pre=request.pre, name=source.name)
            base = GgufModel(outline)
        check_tensor_types(request.options, base.tensors, source.name)
        if not request.options.allow_requantize:
            request = request.with_types(kept_types(published(base)))
        options = replace(request.options, imatrix=None)
        report = quantize(base.path, folder / "unused.gguf", options, dry_run=True)
        if request.no_fallback:
            require_no_fallback(base, options, folder)
        fallbacks = {fallback.tensor: fallback for fallback in report.fallbacks}
        tensors = tuple(
            _gguf_tensor(base.tensors[planned.name], planned.target_type, fallbacks.get(planned.name))
            for planned in report.tensors
        )
        base_bytes = sum(tensor.n_bytes for tensor in base.tensors.values())
        predicts = isinstance(request.defense, FeedbackOptions) and not request.options.file_type.base
        prediction = _prediction(request, base) if predicts else None
        bits = 8 * sum(tensor.n_bytes for tensor in tensors) / base.n_weights
        warnings = [*report.warnings, *fallback_warning(report.fallbacks, base, request.options.file_type.name, bits)]
    if request.options.file_type.needs_imatrix and request.options.imatrix is None and not _measures(request):
        warnings.append(f"{request.options.file_type.name} needs an importance matrix: pass --imatrix FILE")
    size = size_of((tensor.name, tensor.shape) for tensor in tensors)
    return _dry(request, output.outfile, tensors, base_bytes, size, warnings, prediction)


def _dry_folder(request: FolderRequest) -> DryRun:
    output = FolderOutput(request)
    output.open()
    opened = output.opened
    tensors = tuple(
        _folder_tensor(request, tensor, opened.module_of(tensor) is not None)
        for tensor in opened.checkpoint.tensors.values()
    )
    return _dry(request, output.outfile, tensors, opened.n_bytes, opened.size(), list(output.warnings))


def _dry(
    request: ConversionRequest,
    outfile: Path,
    tensors: tuple[DryTensor, ...],
    base_bytes: int,
    size: ModelSize,
    warnings: list[str],
    prediction: FeedbackCost | None = None,
) -> DryRun:
    learning = dry_cost(request, size, warnings) if prediction is None else None
    memory = _memory(tensors, request.threads)
    if prediction is not None:
        memory = prediction.memory_bytes
    elif learning is not None:
        memory = max(memory, learning.memory_bytes)
    return DryRun(
        outfile=outfile,
        tensors=tensors,
        base_bytes=base_bytes,
        out_bytes=sum(tensor.n_bytes for tensor in tensors),
        memory_bytes=memory,
        warnings=tuple(warnings),
        learning=learning,
        prediction=prediction,
    )


def _prediction(request: GgufRequest, base: GgufModel) -> FeedbackCost:
    """What `feedback` will take on this machine, after some seconds of measuring it."""
    if request.max_memory is not None:
        require_memory(base.tensors.values(), request.max_memory)
    parent = max(PARENT_BYTES, resident_bytes("RssAnon"))
    types = Counter[GgmlType]()
    for tensor in base.tensors.values():
        types[tensor.ggml_type] += tensor.n_weights
    threads = request.threads or available_cores()
    return cost_of(
        model_of(base, request.calibration),
        measured_rates(request.options, types.most_common(1)[0][0], threads),
        limit=request.max_memory,
        parent=parent,
        quantizer=quantizer_bytes(base.tensors.values()),
    )


def _measures(request: GgufRequest) -> bool:
    """Whether the conversion measures an importance matrix by itself: with a defense that sees activations."""
    return isinstance(request.defense, FeedbackOptions | QuantGuardOptions)


def _gguf_tensor(tensor: TensorInfo, target: str, fallback: Fallback | None) -> DryTensor:
    target_type = type_named(target)
    protection = "float"
    if target_type not in FLOAT_TYPES:
        protection = GRIDS[target_type].kind if target_type in GRIDS else "none"
    size = stored_bytes(target_type, tensor.shape, tensor.name)
    return DryTensor(tensor.name, tensor.shape, tensor.ggml_type.name, target, size, protection, fallback)


def _folder_tensor(request: FolderRequest, tensor: SourceTensor, rounded: bool) -> DryTensor:
    floating = tensor.dtype in PLAIN_DTYPES
    target = request.base_type.upper() if request.base_type and floating else tensor.dtype
    size = bytes_as(tensor, target)
    if rounded and request.to != "hf":
        target = request.to.upper()
        size = bnb_layout.stored_bytes(request.to, (tensor.shape[0], tensor.shape[1]), request.double_quant)
    return DryTensor(tensor.name, tensor.shape, tensor.dtype, target, size, "scalar" if rounded else "float")


def _memory(tensors: tuple[DryTensor, ...], threads: int) -> int:
    """Peak of the quantizer (the largest tensor as source, f32 and output) or of planning (a few slices per thread)."""
    largest = max((math.prod(tensor.shape) * (4 + 4) + tensor.n_bytes for tensor in tensors), default=0)
    planning = TORCH_BYTES + (threads or available_cores()) * SLICE_ARRAYS * 4 * SLICE_WEIGHTS
    return max(largest, planning)
