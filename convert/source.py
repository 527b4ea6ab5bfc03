"""Where a model comes from: a Hugging Face folder, a hub id, or a GGUF file."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from convert.gguf_file import PUBLISHED_TYPES, GgufModel, TensorInfo
from convert.missing import SourceError, looks_like_hub_id, missing
from convert.reading import check_folder
from convert.tensor_io import FLOAT_TYPES
from quant_grids.errors import UnsupportedError

OFFLINE = "QGUARD_OFFLINE"
"""Environment variable that `--offline` sets: no hub is asked."""
NO_LANGUAGE = ("clip",)
"""Architectures of files that are no language models."""
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md", "LICENSE*"]


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        path: folder, or GGUF file (first shard of a split one).
        name: for file names and metadata, without any path.
        is_gguf: whether `path` is a GGUF file.
    """

    path: Path
    name: str
    is_gguf: bool


def resolve_source(model: str, revision: str | None = None) -> Source:
    """Find the model that the user named; a hub id is downloaded (safetensors and small text files only).

    Nothing contacts a hub unless the argument is a hub id, no such path exists, and it does not look like one: an id that is
    also the beginning of a path here (a folder of the owner's name) is a mistyped path.

    Raises:
        SourceError: no such file or folder, the hub did not deliver, or `OFFLINE` is set.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SourceError(f"{path.name} is neither a folder nor a .gguf file; give the model's folder")
        return Source(path, _stem(path), is_gguf=True)
    if path.is_dir():
        _check_folder(path)
        return Source(path, path.resolve().name, is_gguf=False)
    if looks_like_hub_id(model):
        if os.environ.get(OFFLINE, "0") not in ("", "0"):
            raise SourceError(f"{model!r} is no path here, and --offline does not let the hub be asked; give a path")
        return Source(_download(model, revision), model.rpartition("/")[2], is_gguf=False)
    raise missing(model)


def _check_folder(folder: Path) -> None:
    try:
        check_folder(folder)
    except OSError as error:
        raise SourceError(f"the folder {folder.name} cannot be read: {error.strerror}") from error


def _stem(path: Path) -> str:
    stem = path.stem
    head, _, tail = stem.rpartition("-of-")
    if tail.isdigit() and head[-5:].isdigit():
        stem = head[:-6]
    for suffix in ("-f32", "-f16", "-bf16", ".f32", ".f16", ".bf16"):
        if stem.lower().endswith(suffix):
            return stem[: -len(suffix)]
    return stem


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{repo!r} is no local folder and could not be fetched from the hub: {reason}") from error


REQUANTIZE = ", or pass --allow-requantize: then only what the second rounding adds can be protected"


def open_base(path: Path, allow_requantize: bool, *, way_out: str = REQUANTIZE) -> GgufModel:
    """Open a base GGUF and refuse one that is quantized already, or no language model.

    Args:
        path: of the file.
        allow_requantize: accept a quantized one.
        way_out: the end of the message about a quantized one; a command without `--allow-requantize` gives another.

    Raises:
        UnsupportedError: it is quantized and `allow_requantize` is not set, or holds the vision or audio part of a model.
        FormatError: it is not a sound GGUF.
    """
    base = GgufModel(path)
    if base.architecture in NO_LANGUAGE or base.first.get("general.type") == "mmproj":
        raise UnsupportedError(
            f"{path.name} holds the vision or audio part of a model (mmproj), which llama.cpp does not quantize as a language "
            "model; give the language model's file, and ship this one as it is"
        )
    quantized = [tensor for tensor in base.tensors.values() if tensor.ggml_type not in {*FLOAT_TYPES, *PUBLISHED_TYPES}]
    if quantized and not allow_requantize:
        raise UnsupportedError(
            f"{path.name} is already quantized ({quantized[0].name!r} is {quantized[0].ggml_type.name}); give an F32, F16 or "
            f"BF16 model{way_out}"
        )
    return base


def published(base: GgufModel) -> list[TensorInfo]:
    """Tensors of a base that are of a type which models are published in."""
    return [tensor for tensor in base.tensors.values() if tensor.ggml_type in PUBLISHED_TYPES]


def kept_types(tensors: Iterable[TensorInfo]) -> tuple[tuple[str, str], ...]:
    """`--tensor-type` pairs by which llama.cpp copies these tensors."""
    return tuple((f"^{re.escape(tensor.name)}$", tensor.ggml_type.name.lower()) for tensor in tensors)
