"""GGUF files that are sound as files and senseless as models: each is refused or aborts llama.cpp, and neither ends a command."""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFValueType

from convert.gguf_file import GgufFile, TensorInfo

STRING, ARRAY = int(GGUFValueType.STRING), int(GGUFValueType.ARRAY)
U32, F32 = int(GGUFValueType.UINT32), int(GGUFValueType.FLOAT32)
I32 = int(GGMLQuantizationType.I32)
ALIGNMENT = 32


def text(content: bytes) -> bytes:
    """A string as it stands in a file."""
    return struct.pack("<Q", len(content)) + content


def entry(key: str, kind: int, value: bytes) -> bytes:
    """A metadata entry."""
    return text(key.encode()) + struct.pack("<I", kind) + value


def number(key: str, value: int) -> bytes:
    return entry(key, U32, struct.pack("<I", value))


def real(key: str, value: float) -> bytes:
    return entry(key, F32, struct.pack("<f", value))


def strings(key: str, values: Sequence[bytes]) -> bytes:
    return entry(key, ARRAY, struct.pack("<IQ", STRING, len(values)) + b"".join(map(text, values)))


def rewrite(source: Path, out: Path, entries: Mapping[str, bytes], types: Mapping[str, int] | None = None) -> Path:
    """Copy a GGUF with other metadata entries, and tensors that claim another type of the same size.

    Args:
        source: a file with the usual alignment.
        out: the copy.
        entries: whole entries by key; those of other keys stay.
        types: ggml type by tensor.
    """
    file = GgufFile(source)
    data = source.read_bytes()
    kept = {key: data[field.start : field.end] for key, field in file.fields.items()}
    metadata = kept | dict(entries)
    start = min(tensor.offset for tensor in file.tensors.values())

    def info(tensor: TensorInfo) -> bytes:
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        kind = (types or {}).get(tensor.name, int(tensor.ggml_type))
        return text(tensor.name.encode()) + shape + struct.pack("<IQ", kind, tensor.offset - start)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(file.tensors), len(metadata))
    head += b"".join(metadata.values()) + b"".join(map(info, file.tensors.values()))
    out.write_bytes(head + bytes(-len(head) % ALIGNMENT) + data[start:])
    return out


@dataclass(frozen=True)
class Hostile:
    """How a Llama becomes senseless: new entries for a file, and types of tensors."""

    entries: Callable[[GgufFile], Mapping[str, bytes]] = lambda _: {}
    types: Mapping[str, int] | None = None

    def make(self, source: Path, out: Path) -> Path:
        return rewrite(source, out, self.entries(GgufFile(source)), self.types)


def _tokens(change: Callable[[list[bytes]], list[bytes]]) -> Hostile:
    def entries(file: GgufFile) -> Mapping[str, bytes]:
        tokens = [str(token).encode() for token in file.get("tokenizer.ggml.tokens")]
        return {"tokenizer.ggml.tokens": strings("tokenizer.ggml.tokens", change(tokens))}

    return Hostile(entries)


def _number(key: str, value: int) -> Hostile:
    return Hostile(lambda _: {key: number(key, value)})


def _epsilon(value: float) -> Hostile:
    key = "llama.attention.layer_norm_rms_epsilon"
    return Hostile(lambda _: {key: real(key, value)})


MODELS = {
    "block_count 0": _number("llama.block_count", 0),
    "block_count 2^20": _number("llama.block_count", 1 << 20),
    "block_count 2^32-1": _number("llama.block_count", (1 << 32) - 1),
    "eps negative": _epsilon(-1.0),
    "eps NaN": _epsilon(float("nan")),
    "expert_count 2^31": _number("llama.expert_count", 1 << 31),
    "integer norm": Hostile(types={"blk.0.attn_norm.weight": I32, "output_norm.weight": I32}),
    "duplicate tokens": _tokens(lambda tokens: [*tokens[:-20], *[tokens[5]] * 20]),
    "tokens not UTF-8": _tokens(lambda tokens: [*tokens[:40], *[b"\xff\xfe" + t for t in tokens[40:]]]),
    "tokenizer none": Hostile(lambda _: {"tokenizer.ggml.model": entry("tokenizer.ggml.model", STRING, text(b"none"))}),
}
