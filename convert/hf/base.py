"""From a Hugging Face folder to a full-precision GGUF, the "base" that everything else starts from.

What happens, in order:

1. **Plan** (`convert.hf.plan`): config.json picks a family; the family lists the tensors it expects; the
   safetensors headers are checked against that list; the tokenizer is read. No weight has been touched yet
   and every way this can fail, short of a disk error, has been ruled out.
2. **Write**: the GGUF's header, metadata and tensor list go out first (their sizes are known), then the
   tensors, one at a time: read, transform, cast, write, forget. Memory stays at one tensor.

The base keeps the checkpoint's own precision, because every later comparison measures against it: bf16 stays
bf16, f16 stays f16, f32 stays f32. Norms, biases and other one-dimensional tensors are float32, which is what
llama.cpp computes them in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from convert.hf.checkpoint import Checkpoint
from convert.hf.families import Setting
from convert.hf.general import general_metadata
from convert.hf.plan import BasePlan, BaseTensor, make_plan
from quant_grids.errors import FormatError

Progress = Callable[[str, int, int], None]
"""Called after each tensor with its GGUF name, the bytes written so far and the bytes in all."""


@dataclass(frozen=True)
class BaseReport:
    """What a base GGUF holds.

    Attributes:
        architecture: llama.cpp's name, such as `llama`.
        family: The built-in family's name, such as `Mistral`.
        tensors: Number of tensors.
        parameters: Number of weights in them.
        nbytes: Bytes of tensor data.
        base_type: `f32`, `f16` or `bf16`, the type of most matrices.
        tokenizer_model: `tokenizer.ggml.model`.
        tokenizer_pre: `tokenizer.ggml.pre`.
        warnings: What llama.cpp will do differently from the original model, one sentence each.
    """

    architecture: str
    family: str
    tensors: int
    parameters: int
    nbytes: int
    base_type: str
    tokenizer_model: str
    tokenizer_pre: str
    warnings: tuple[str, ...]


def describe_folder(folder: Path, *, base_type: str | None = None, pre: str | None = None) -> BaseReport:
    """Checks that a folder can be converted and says what the base would hold, without writing anything.

    Args:
        folder: The model folder.
        base_type: As for `write_base_gguf`.
        pre: As for `write_base_gguf`.

    Raises:
        FormatError: The folder is incomplete, malformed or contradicts itself.
        UnsupportedError: A valid model this converter cannot handle; the message names the ways out.
    """
    return _report(make_plan(folder, base_type=base_type, pre=pre))


def write_base_gguf(
    folder: Path,
    outfile: Path,
    *,
    base_type: str | None = None,
    pre: str | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> BaseReport:
    """Writes the full-precision GGUF of a model folder.

    The output is written in place: give the name of a temporary file and rename it afterwards. It is left
    behind, incomplete, when an error is raised.

    Args:
        folder: The model folder.
        outfile: The file to write.
        base_type: `f32`, `f16` or `bf16`, or None to keep the checkpoint's own type.
        pre: llama.cpp's pre-tokenizer name, for a tokenizer that is not recognised.
        name: The model's name or hub id, for the metadata; by default the folder's name.
        progress: Called after each tensor.

    Raises:
        FormatError: The folder is incomplete, malformed or contradicts itself, or a file cannot be written.
        UnsupportedError: A valid model this converter cannot handle; the message names the ways out.
    """
    plan = make_plan(folder, base_type=base_type, pre=pre)
    writer = _prepare(plan, name)
    try:
        writer.write_header_to_file(path=outfile)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for tensor in plan.tensors:
            writer.write_tensor_data(build_tensor(plan.checkpoint, tensor))
            done += tensor.nbytes
            if progress:
                progress(tensor.name, done, plan.nbytes)
    except OSError as error:
        raise FormatError(f"Cannot write {outfile}: {error.strerror or error}.") from error
    finally:
        writer.close()
    return _report(plan)


def write_base_outline(
    folder: Path,
    outfile: Path,
    *,
    base_type: str | None = None,
    pre: str | None = None,
    name: str | None = None,
) -> BaseReport:
    """Writes the base's header and leaves a hole where the weights would be: enough for llama.cpp to plan from.

    The file has the full size but takes no room on file systems with sparse files. Arguments and errors as for
    `write_base_gguf`.
    """
    plan = make_plan(folder, base_type=base_type, pre=pre)
    writer = _prepare(plan, name)
    try:
        writer.write_header_to_file(path=outfile)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    alignment = gguf.GGUF_DEFAULT_ALIGNMENT
    size = -(-outfile.stat().st_size // alignment) * alignment
    with outfile.open("r+b") as file:
        file.truncate(size + sum(-(-tensor.nbytes // alignment) * alignment for tensor in plan.tensors))
    return _report(plan)


def build_tensor(checkpoint: Checkpoint, tensor: BaseTensor) -> npt.NDArray[Any]:
    """Reads, transforms and casts one tensor.

    Args:
        checkpoint: The weights.
        tensor: What to build.

    Returns:
        A contiguous array of the tensor's shape: float32, float16, or int16 holding bfloat16 bits.

    Raises:
        FormatError: A value does not fit float16.
    """
    if tensor.part.data is not None:
        return np.ascontiguousarray(tensor.part.data.numpy())
    value = tensor.part.transform([checkpoint.read(name) for name in tensor.sources])
    if tensor.type == gguf.GGMLQuantizationType.F32:
        return value.to(torch.float32).contiguous().numpy()
    if tensor.type == gguf.GGMLQuantizationType.BF16:
        return value.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
    half = value.to(torch.float16).contiguous()
    if value.dtype != torch.float16 and torch.isinf(half).any() and not torch.isinf(value).any():
        largest = float(value.abs().max())
        raise FormatError(
            f"Tensor {tensor.name} has values up to {largest:g}, beyond float16's 65504; use --base-type bf16 or f32."
        )
    return half.numpy()


def _prepare(plan: BasePlan, name: str | None) -> gguf.GGUFWriter:
    """A writer with all metadata and tensor descriptions, and no file yet."""
    writer = gguf.GGUFWriter(path=None, arch=plan.architecture)
    for tensor in plan.tensors:
        # The writer reads uint8 as "already quantized bytes", so the two-byte types are announced as what
        # they are.
        dtype = np.dtype(np.float32 if tensor.type == gguf.GGMLQuantizationType.F32 else np.int16)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.nbytes, raw_dtype=tensor.type)
    total, shared, expert, experts = writer.get_total_parameter_count()
    metadata = general_metadata(plan.folder, plan.config, name, total)
    if metadata.size_label is None:
        metadata.size_label = gguf.size_label(total, shared, expert, experts)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)
    for setting in plan.settings:
        _add(writer, plan.architecture, setting)
    writer.add_file_type(plan.file_type)
    plan.tokenizer.write(writer)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _add(writer: gguf.GGUFWriter, architecture: str, setting: Setting) -> None:
    writer.add_key_value(f"{architecture}.{setting.key}", setting.value, setting.kind)


def _report(plan: BasePlan) -> BaseReport:
    return BaseReport(
        architecture=plan.architecture,
        family=type(plan.family).__name__,
        tensors=len(plan.tensors),
        parameters=sum(tensor.elements for tensor in plan.tensors),
        nbytes=plan.nbytes,
        base_type=plan.base_type,
        tokenizer_model=plan.tokenizer.vocabulary.model,
        tokenizer_pre=plan.tokenizer.vocabulary.pre,
        warnings=plan.warnings,
    )
