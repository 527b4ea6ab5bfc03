"""The weights of a Hugging Face folder, one tensor at a time.

A checkpoint is one `model.safetensors`, or several shards with a `model.safetensors.index.json` that says
which tensor is in which file. Both are opened just far enough to list names, dtypes and shapes; data is read
one tensor at a time, and each read opens its shard anew, because an open shard is a memory map whose touched
pages would add up to the size of the model.

Pickle files (`pytorch_model.bin`) can run code when they are loaded, so they are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from convert.hf.jsonfile import read_json
from convert.reading import check_folder
from quant_grids.errors import FormatError, UnsupportedError

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors' names of the dtypes a base GGUF can hold, with torch's."""


@dataclass(frozen=True)
class Scale:
    """The scale of an FP8 weight.

    Attributes:
        name: Its tensor.
        file: The shard that holds it.
        block: Rows and columns of the weight that share one scale; None for one scale in all.
    """

    name: str
    file: Path
    block: tuple[int, int] | None


@dataclass(frozen=True)
class SourceTensor:
    """A tensor as the checkpoint declares it.

    Attributes:
        name: Its name in the checkpoint.
        dtype: Safetensors' name of the element type, such as `BF16`.
        shape: Its shape, outermost dimension first.
        file: The shard that holds it.
        scale: For an FP8 weight, what to multiply it with; `dtype` then is the type it is turned into.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    scale: Scale | None = None

    @property
    def elements(self) -> int:
        """Number of elements; a Python int, so a hostile shape cannot wrap it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor of a folder's safetensors files.

    Attributes:
        folder: The model folder.
        tensors: Declared tensors by name.
    """

    folder: Path
    tensors: Mapping[str, SourceTensor]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Lists the tensors of a folder without reading their data.

        Raises:
            FormatError: No safetensors file, a broken one, an index that contradicts the shards or points
                outside the folder.
            UnsupportedError: The folder has pickle files only.
        """
        check_folder(folder)
        tensors: dict[str, SourceTensor] = {}
        index = _read_index(folder)
        for file in sorted(set(index.values())) if index else _find_single(folder):
            for tensor in _list_file(file):
                if tensor.name in tensors:
                    first = tensors[tensor.name].file.name
                    raise FormatError(f"Tensor {tensor.name} is in both {first} and {file.name}.")
                tensors[tensor.name] = tensor
        for name, file in index.items():
            if name not in tensors or tensors[name].file != file:
                raise FormatError(f"{INDEX_NAME} says {name} is in {file.name}, but it is not there.")
        if not tensors:
            raise FormatError(f"The safetensors files in {folder} hold no tensors.")
        return cls(folder, tensors)

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor: its own dtype and shape, FP8 weights multiplied out.

        Raises:
            FormatError: The file changed or cannot be read.
        """
        source = self.tensors[name]
        tensor = _read(source.file, name)
        if tuple(tensor.shape) != source.shape:
            raise FormatError(f"{source.file.name} changed while it was being read (tensor {name}).")
        if source.scale is None:
            return tensor
        factors = _read(source.scale.file, source.scale.name)
        return multiply_out(tensor, factors, source.scale.block, PLAIN_DTYPES[source.dtype])


def _read(file: Path, name: str) -> torch.Tensor:
    try:
        with safe_open(file, framework="pt", device="cpu") as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise FormatError(f"Cannot read tensor {name} from {file.name}: {error}.") from error


def multiply_out(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, dtype: torch.dtype
) -> torch.Tensor:
    """`stored * scale`, computed in float32.

    Args:
        weight: FP8 [rows, columns].
        scale: [ceil(rows / block rows), ceil(columns / block columns)], or one element when `block` is None.
        block: Rows and columns that share a scale.
        dtype: Type of the result.
    """
    factors = scale.float()
    if block is None:
        return (weight.float() * factors.reshape(())).to(dtype)
    rows, columns = weight.shape
    factors = factors.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (weight.float() * factors).to(dtype)


def _find_single(folder: Path) -> list[Path]:
    """The one safetensors file of a folder without an index."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    named = [path for path in files if path.name == "model.safetensors"]
    if named or len(files) == 1:
        return named or files
    if files:
        raise FormatError(
            f"{folder} has {len(files)} safetensors files but no {INDEX_NAME} that says which belong to the model."
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UnsupportedError(
            f"{folder} has only pickle weights (.bin), which can run code when loaded; "
            "save the model as safetensors (save_pretrained does) and convert that."
        )
    raise FormatError(f"{folder} has no model.safetensors; give a folder with safetensors weights or a .gguf file.")


def _read_index(folder: Path) -> dict[str, Path]:
    """Tensor name -> shard from the index file; empty when the folder has none."""
    path = folder / INDEX_NAME
    if not path.exists():
        return {}
    weight_map = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{INDEX_NAME} has no weight_map.")
    files: dict[str, Path] = {}
    for name, file_name in weight_map.items():
        # A shard is a plain file name: anything with a separator, a drive or a parent could leave the folder.
        if not isinstance(file_name, str) or file_name != Path(file_name).name or "\\" in file_name:
            raise FormatError(f"{INDEX_NAME} names {file_name!r:.120}, which is not a file of the folder.")
        if not file_name.endswith(".safetensors"):
            raise FormatError(f"{INDEX_NAME} names {file_name!r:.120}, which is not a safetensors file.")
        files[name] = folder / file_name
    return files


def _list_file(path: Path) -> list[SourceTensor]:
    """Names, dtypes and shapes in one safetensors file; safetensors itself checks its offsets and sizes."""
    if not path.is_file():
        raise FormatError(f"{path.name} is missing from {path.parent}; the download may be incomplete.")
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            listed = []
            for name in shard.keys():  # noqa: SIM118 - a safe_open handle is not a dict
                view = shard.get_slice(name)
                listed.append(SourceTensor(name, str(view.get_dtype()), tuple(view.get_shape()), path))
            return listed
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path.name} is not a readable safetensors file: {error}.") from error
