"""A model folder that is to be rounded for bitsandbytes, opened and understood. Writes nothing.

Which modules bitsandbytes quantizes is asked of transformers (every Linear but the output head and tied weights), so a
folder made here has exactly the modules that `load_in_4bit` would have made.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convert.hf.checkpoint import PLAIN_DTYPES, Checkpoint, SourceTensor
from convert.hf.jsonfile import Section, read_json
from convert.hf.quantized import open_weights
from convert.hf_folder import CONFIG_NAME
from convert.source import Source
from qguard_edge.learned.memory import ModelSize, size_of
from qguard_edge.runtimes.bnb import LinearModules, linear_modules
from quant_grids.errors import UnsupportedError

_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class OpenedFolder:
    """A folder's contents.

    Attributes:
        source: the model.
        config: config.json.
        checkpoint: the weights.
        modules: what gets quantized.
        warnings: one sentence each.
    """

    source: Source
    config: Mapping[str, Any]
    checkpoint: Checkpoint
    modules: LinearModules
    warnings: tuple[str, ...]

    def size(self) -> ModelSize:
        """Of the model, for the estimates of learning."""
        return size_of((tensor.name, tensor.shape) for tensor in self.checkpoint.tensors.values())

    @property
    def n_bytes(self) -> int:
        """Size of the tensor data as it is read."""
        return sum(bytes_as(tensor, tensor.dtype) for tensor in self.checkpoint.tensors.values())

    def module_of(self, tensor: SourceTensor) -> str | None:
        """Name of the module whose weight this is, if it is to be quantized."""
        name = tensor.name.removesuffix(".weight")
        return name if name != tensor.name and name in self.modules.transposed else None


def open_folder(source: Source, to: str, skip: tuple[str, ...]) -> OpenedFolder:
    """Open a model folder.

    Args:
        source: the model.
        to: `--to`, for messages.
        skip: modules to leave alone beside those that transformers leaves out.

    Raises:
        QGuardError: one of its kinds, with a sentence for the user.
    """
    if source.is_gguf:
        raise UnsupportedError(f"--to {to} writes a Hugging Face folder and needs one as input, not {source.path.name}")
    config = read_json(source.path / CONFIG_NAME)
    checkpoint, warnings = open_weights(source.path, Section(config, CONFIG_NAME))
    modules = linear_modules(source.path, skip)
    _check_weights(checkpoint, modules)
    return OpenedFolder(source, config, checkpoint, modules, warnings)


def _check_weights(checkpoint: Checkpoint, modules: LinearModules) -> None:
    if not modules.transposed:
        raise UnsupportedError(
            "this model has no linear module that bitsandbytes would quantize; convert it to a GGUF instead"
        )
    for name in modules.transposed:
        tensor = checkpoint.tensors.get(f"{name}.weight")
        if tensor is None:
            raise UnsupportedError(
                f"the checkpoint has no tensor {name}.weight, which bitsandbytes would quantize; leave the module out with "
                f"--bnb-skip {name}, or save the model anew with a current transformers"
            )
        if tensor.dtype not in PLAIN_DTYPES or len(tensor.shape) != 2 or tensor.elements == 0:
            raise UnsupportedError(
                f"tensor {tensor.name} is {tensor.dtype} {list(tensor.shape)}; only matrices of F32, F16 or BF16 can be quantized"
            )


def bytes_as(tensor: SourceTensor, dtype: str) -> int:
    """Size of a tensor's data when it is stored in a type."""
    return tensor.elements * _SIZES.get(dtype, 1)
