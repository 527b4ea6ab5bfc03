"""Checkpoints that are quantized already: which are refused, and how FP8 ones are opened.

Rounding a model twice protects nothing: a backdoor that waits for rounding has met it in the first one. So
checkpoints from bitsandbytes, GPTQ, AWQ and the like are refused, with the advice to convert the original.

FP8 with block scales is different: some models (DeepSeek's, Qwen3's FP8 editions) are *published* that way. Each
matrix is stored as 8-bit floats with one scale per block of 128 x 128 weights beside it, `weight = stored * scale`;
undoing that gives the weights that other programs run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from convert.hf.checkpoint import Checkpoint, Scale, SourceTensor
from convert.hf.jsonfile import Section
from quant_grids.errors import FormatError, UnsupportedError

FP8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})
_SCALE = "_scale_inv"
_UNUSED = (".activation_scale", ".input_scale")  # scales of activations, for kernels that multiply in FP8
_FROM_GGUF = (
    "config.json says that these weights were read from a GGUF; if that was a quantized one, they lie on its grid, and "
    "only what another rounding adds can be protected."
)
_NAMES = {"F32": "F32", "FLOAT32": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}


def open_weights(folder: Path, config: Section) -> tuple[Checkpoint, tuple[str, ...]]:
    """Opens a folder's checkpoint, with FP8 weights shown as what they become when read.

    Args:
        folder: The model folder.
        config: config.json.

    Returns:
        The checkpoint, and warnings for the report.

    Raises:
        UnsupportedError: The checkpoint is quantized in another way.
        FormatError: The checkpoint is malformed, or a scale does not fit its weight.
    """
    settings = config.section("quantization_config")
    method = settings.text("quant_method", default="").lower()
    if not method and (folder / "hf_quant_config.json").exists():
        method = "modelopt"
    if not method and settings.values:
        method = "an unnamed method"
    if method not in ("", "fp8", "gguf"):
        raise UnsupportedError(
            f"The checkpoint is already quantized ({method}); convert the original F16 or BF16 model instead, because a "
            "second rounding cannot undo what the first one did; where there is no original, --allow-requantize has llama.cpp's "
            "converter multiply it out, if it knows the method (`qguard-edge converter install`)."
        )
    checkpoint = Checkpoint.open(folder)
    if method == "fp8":
        return _with_scales(checkpoint, _block(settings), _target(config)), ()
    # transformers leaves this note on a model that it read from a GGUF and dequantized; the weights here are plain.
    warnings = (_FROM_GGUF,) if method == "gguf" else ()
    return checkpoint, warnings


def _block(settings: Section) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None for one scale per tensor."""
    size = settings.values.get("weight_block_size")
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(n, int) and 0 < n <= 1 << 16 for n in size):
        raise FormatError(f"{settings.origin}: weight_block_size must be two positive integers, not {size!r:.80}.")
    return size[0], size[1]


def _target(config: Section) -> str:
    """Safetensors' name of the type that FP8 weights are turned into: the one the model computes in."""
    return _NAMES.get(config.text("dtype", "torch_dtype", default="bfloat16").upper(), "BF16")


def _with_scales(checkpoint: Checkpoint, block: tuple[int, int] | None, target: str) -> Checkpoint:
    """Pairs each FP8 weight with its scale and hides the scales."""
    tensors: dict[str, SourceTensor] = {}
    for name, source in checkpoint.tensors.items():
        if name.endswith((_SCALE, *_UNUSED)):
            continue
        if source.dtype in FP8_DTYPES:
            scale = checkpoint.tensors.get(name + _SCALE)
            if scale is None:
                raise FormatError(f"Tensor {name} is stored as {source.dtype} but has no {name}{_SCALE}.")
            _check_scale(source, scale, block)
            source = replace(source, dtype=target, scale=Scale(scale.name, scale.file, block))
        tensors[name] = source
    return Checkpoint(checkpoint.folder, tensors)


def _check_scale(weight: SourceTensor, scale: SourceTensor, block: tuple[int, int] | None) -> None:
    if len(weight.shape) != 2:
        raise UnsupportedError(f"Tensor {weight.name} is stored as {weight.dtype} with {len(weight.shape)} dimensions.")
    expected = (1,) if block is None else tuple(-(-n // b) for n, b in zip(weight.shape, block, strict=True))
    if scale.elements != 1 if block is None else scale.shape != expected:
        raise FormatError(
            f"Tensor {scale.name} has the shape {list(scale.shape)}, but its weight calls for {list(expected)}."
        )
