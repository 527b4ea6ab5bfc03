"""Facts of the files, and whether they can be compared at all."""

from pathlib import Path
from typing import Literal

from convert.ftypes import FILE_TYPES
from convert.gguf_file import PUBLISHED_TYPES, GgufFile, GgufModel
from convert.hashes import sha256_of
from qguard_edge.verify.results import FileFacts, TensorChange
from quant_grids.errors import FormatError, QGuardError

Role = Literal["candidate", "base", "plain", "suite", "text"]
TOKENIZER_KEYS = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.merges")
TEMPLATE_KEY = "tokenizer.chat_template"
_PREFIX = "qguard."


class PairError(QGuardError):
    """The files do not belong together."""


def model_facts(role: Role, model: GgufModel, name: str | None = None) -> FileFacts:
    """Facts of a GGUF; `name` where the report should show another one than the file's."""
    first = model.first
    number = first.get("general.file_type")
    types = {file_type.number: file_type.name for file_type in FILE_TYPES}
    return FileFacts(
        role=role,
        name=name or model.path.name,
        sha256=sha256_of(shard.path for shard in model.shards),
        size=model.n_bytes,
        file_type=types.get(number) if isinstance(number, int) else None,
        architecture=model.architecture,
        qguard={key.removeprefix(_PREFIX): str(first.value(key)) for key in first.fields if key.startswith(_PREFIX)},
    )


def quantized_tensors(model: GgufModel) -> int:
    """Tensors of a GGUF that are neither F32, F16, BF16 nor whole numbers, nor of a type that models are published in."""
    plain = {"F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64", *(kind.name for kind in PUBLISHED_TYPES)}
    return sum(tensor.ggml_type.name not in plain for shard in model.shards for tensor in shard.tensors.values())


def text_facts(role: Role, path: Path) -> FileFacts:
    """Facts of a suite or text file."""
    return FileFacts(role, path.name, sha256_of([path]), path.stat().st_size)


def check_pair(base: GgufModel, other: GgufModel) -> list[str]:
    """Refuse files that cannot be compared.

    Returns:
        Warnings, one sentence each.

    Raises:
        PairError: another architecture or another tokenizer: the same token ids would mean different texts.
    """
    a, b = base.first, other.first
    names = f"{b.path.name} and the base {a.path.name}"
    if base.architecture != other.architecture:
        raise PairError(
            f"{names} are different models ({other.architecture}, {base.architecture}); verify compares a file with the "
            "full-precision GGUF it was made from"
        )
    for key in TOKENIZER_KEYS:
        if not _same(a, b, key):
            raise PairError(f"{names} have different tokenizers ({key} differs); verify needs the same token ids for both")
    if not _same(a, b, TEMPLATE_KEY):
        return [f"{names} carry different chat templates; the base's was used for both"]
    return []


def _same(a: GgufFile, b: GgufFile, key: str) -> bool:
    if (key in a.fields) != (key in b.fields):
        return False
    if key not in a.fields:
        return True
    first, second = a.fields[key], b.fields[key]
    return a.raw(first.value_start, first.end) == b.raw(second.value_start, second.end)


def tensor_changes(plain: GgufModel, candidate: GgufModel, base: GgufModel, threads: int) -> tuple[TensorChange, ...]:
    """Codes chosen anew and alignment per tensor; empty when the two files have not the same layout."""
    from convert.diff import compare_files  # imports torch

    try:
        found = compare_files(plain.path, candidate.path, base=base.path, threads=threads)
    except FormatError:
        return ()
    return tuple(TensorChange(t.name, t.ggml_type.name, t.n_weights, t.codes_changed, t.alignment) for t in found.tensors)
