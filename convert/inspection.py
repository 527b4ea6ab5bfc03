"""What a GGUF says about itself, as values; its weights are not read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.diff import qguard_metadata
from convert.gguf_file import GgufModel, TensorInfo


@dataclass(frozen=True)
class GgufSummary:
    """A GGUF, all shards of a split one together.

    Attributes:
        file: name of the (first) file.
        name: of the model, by its own account.
        architecture: in llama.cpp's words.
        n_weights: of all tensors.
        n_bytes: of all files.
        shards: how many files.
        qguard: `qguard.*` metadata without the prefix; empty: the file was not made by qguard-edge.
        tensors: in file order.
    """

    file: str
    name: str
    architecture: str
    n_weights: int
    n_bytes: int
    shards: int
    qguard: Mapping[str, object]
    tensors: tuple[TensorInfo, ...]


def inspect_gguf(path: Path) -> GgufSummary:
    """Read a GGUF's header.

    Args:
        path: the file, or the first shard.

    Raises:
        FormatError: it is no sound GGUF.
    """
    model = GgufModel(path)
    return GgufSummary(
        file=path.name,
        name=str(model.first.get("general.name", path.name)),
        architecture=model.architecture,
        n_weights=model.n_weights,
        n_bytes=model.n_bytes,
        shards=len(model.shards),
        qguard=qguard_metadata(model.first),
        tensors=tuple(model.tensors.values()),
    )


def summary_document(found: GgufSummary) -> dict[str, Any]:
    """The summary as JSON values."""
    return {
        "status": "ok",
        "file": found.file,
        "architecture": found.architecture,
        "weights": found.n_weights,
        "bytes": found.n_bytes,
        "qguard": dict(found.qguard),
        "tensors": [
            {"name": tensor.name, "type": tensor.ggml_type.name, "shape": list(tensor.shape), "bytes": tensor.n_bytes}
            for tensor in found.tensors
        ],
    }
