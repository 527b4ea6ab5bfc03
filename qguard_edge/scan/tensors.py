"""A model's float tensors as the scan reads them: the same positioned, sliced reads for a GGUF and for safetensors.

A safetensors file is a JSON header with the offset of every tensor, then the bytes, rows one after the other as in a GGUF.
So a tensor of either is a `TensorInfo`, and `convert.tensor_io.TensorReader` streams both.

Where the two differ: converting a folder reorders rows of q and k (which makes no difference to blocks along a row), transposes
GPT-2's matrices and multiplies FP8 weights out. Models of the last two kinds are written as a temporary base GGUF first.
"""

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType

from convert.gguf_file import GgufModel, TensorInfo
from convert.hf.base import write_base_gguf
from convert.hf.checkpoint import Checkpoint
from convert.hf.jsonfile import read_json
from convert.scratch import scratch_folder
from convert.source import Source, open_base
from convert.tensor_io import FLOAT_TYPES
from qguard_edge.progress import Progress
from quant_grids.errors import FormatError

_TYPES = {"F32": GGMLQuantizationType.F32, "F16": GGMLQuantizationType.F16, "BF16": GGMLQuantizationType.BF16}
_WHOLE_NUMBERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")
_TRANSPOSED = ("gpt2",)  # model types whose linear layers are stored [in, out]
_KINDS = (
    ("attn_qkv", ("attn_qkv", "qkv_proj", "c_attn", "query_key_value")),
    ("attn_q", ("attn_q", "q_proj")),
    ("attn_k", ("attn_k", "k_proj")),
    ("attn_v", ("attn_v", "v_proj")),
    ("attn_output", ("attn_output", "o_proj", "attn.c_proj", "self_attn.dense", "out_proj")),
    ("ffn_gate", ("ffn_gate", "gate_proj")),
    ("ffn_down", ("ffn_down", "down_proj", "mlp.c_proj", "fc2", ".w2.")),
    ("ffn_up", ("ffn_up", "up_proj", "c_fc", "fc1")),
    ("embedding", ("token_embd", "embed_tokens", "wte", "wpe", "position_embd")),
    ("output", ("output.weight", "lm_head")),
)


def kind_of(name: str) -> str:
    """What a matrix is for, by its name: `attn_q`, `ffn_up`, ..., `other`."""
    return next((kind for kind, marks in _KINDS if any(mark in name for mark in marks)), "other")


def is_matrix(tensor: TensorInfo) -> bool:
    """Whether a tensor can be quantized at all: two or more dimensions, rows of at least one chunk."""
    return len(tensor.shape) >= 2 and tensor.columns >= 32 and tensor.rows > 1


BEFORE = ": a scan looks at weights before they are rounded"


@dataclass(frozen=True)
class ScanModel:
    """What is scanned.

    Attributes:
        name: without any path.
        path: the folder or file that the user named.
        files: with the tensors' bytes.
        tensors: float tensors.
        base: the GGUF these are from, or None for a folder that is read as it is.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    tensors: tuple[TensorInfo, ...]
    base: GgufModel | None

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(tensor.n_weights for tensor in self.tensors)


def from_base(base: GgufModel, name: str, path: Path) -> ScanModel:
    """A base GGUF; tensors of it that are quantized already are left out."""
    tensors = tuple(tensor for tensor in base.tensors.values() if tensor.ggml_type in FLOAT_TYPES)
    return ScanModel(name, path, tuple(shard.path for shard in base.shards), tensors, base)


@contextmanager
def open_model(source: Source, *, need_base: bool, progress: Progress) -> Iterator[ScanModel]:
    """Open a model for scanning.

    Args:
        source: folder or GGUF.
        need_base: a GGUF is needed whatever the source (a plain file is to be made from it).
        progress: told while a temporary base is written.

    Raises:
        FormatError: the files are broken.
        UnsupportedError: the GGUF is quantized, or the folder needs a base and cannot be converted.
    """
    if source.is_gguf:
        yield from_base(open_base(source.path, allow_requantize=False, way_out=BEFORE), source.name, source.path)
        return
    checkpoint = Checkpoint.open(source.path)
    if not need_base and not _needs_conversion(source.path, checkpoint):
        files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
        tensors = tuple(tensor for file in files for tensor in _tensors_of(file))
        yield ScanModel(source.name, source.path, tuple(files), tensors, None)
        return
    with scratch_folder() as folder:
        path = folder / "base.gguf"
        progress.stage("Writing a temporary base", 0, "B")
        write_base_gguf(source.path, path, name=source.name)
        yield from_base(GgufModel(path), source.name, source.path)


def _needs_conversion(folder: Path, checkpoint: Checkpoint) -> bool:
    """Whether the folder's bytes are not the rows that get quantized."""
    if any(tensor.dtype not in (*_TYPES, *_WHOLE_NUMBERS) for tensor in checkpoint.tensors.values()):
        return True
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("model_type") in _TRANSPOSED


def _tensors_of(file: Path) -> list[TensorInfo]:
    """Float tensors of a safetensors file that `Checkpoint.open` has accepted, with their places in it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > size - 8:
            raise FormatError(f"{file.name}: the header claims {length} bytes, the file has {size}")
        header = json.loads(stream.read(length))
    found = []
    for name, entry in header.items():
        shape = tuple(reversed(entry["shape"])) if name != "__metadata__" else ()
        if not shape or 0 in shape or entry["dtype"] not in _TYPES:
            continue
        start, end = entry["data_offsets"]
        if 8 + length + end > size:
            raise FormatError(f"{file.name}: tensor {name!r} ends past the end of the file; the file is cut off")
        found.append(TensorInfo(name, _TYPES[entry["dtype"]], shape, 8 + length + start, end - start, file))
    return sorted(found, key=lambda tensor: tensor.offset)
