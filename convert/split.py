"""Cut a GGUF into shards, as llama.cpp's `llama-gguf-split` does: same names, same metadata, same bytes.

    NAME-00001-of-00003.gguf    the model's metadata | split.no 0 | split.tensors.count | split.count 3 | its tensors
    NAME-00002-of-00003.gguf                          split.no 1 | split.tensors.count | split.count 3 | its tensors

`split.no` and `split.count` are u16, `split.tensors.count` is an i32 with the number of tensors of the whole model (source:
`tools/gguf-split` of llama.cpp). Tensors keep their order; each is padded to the alignment, the last one too. Sizes count
tensors alone, without metadata, in decimal units: `2G` is 2,000,000,000 bytes.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFValueType

from convert.gguf_file import GgufFile, GgufModel, TensorInfo
from convert.patch import copy_tensor, write_all
from quant_grids.errors import UnsupportedError

SPLIT = "split."
"""Prefix of the keys that say how a model is cut, not what it is."""
MAX_SHARDS = 9999
_UNITS = {"M": 10**6, "G": 10**9}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class SplitRule:
    """How a model is cut; exactly one of the three.

    Attributes:
        max_bytes: tensors of a shard have at most this many bytes together; a tensor that has more is a shard by itself.
        max_tensors: tensors of a shard.
        like_input: as the input is cut.
    """

    max_bytes: int = 0
    max_tensors: int = 0
    like_input: bool = False

    def check(self) -> None:
        """Refuse a rule that is none, or more than one.

        Raises:
            UnsupportedError: naming the options.
        """
        given = [bool(self.max_bytes), bool(self.max_tensors), self.like_input]
        if sum(given) != 1 or self.max_bytes < 0 or self.max_tensors < 0:
            raise UnsupportedError("give one of --split-max-size, --split-max-tensors and --keep-split")


def parse_split_size(text: str) -> int:
    """Bytes of a `--split-max-size` value, `N(M|G)` as llama-gguf-split takes it.

    Raises:
        UnsupportedError: it is no such value.
    """
    match = re.fullmatch(r"(\d{1,9})([MG])", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise UnsupportedError(f"--split-max-size {text!r}: give a number with M or G, for example 2G (2,000,000,000 bytes)")
    return int(match[1]) * _UNITS[match[2]]


def shares_of(whole: GgufFile, rule: SplitRule, base: GgufModel) -> list[list[TensorInfo]]:
    """The tensors of each shard.

    Args:
        whole: the file to cut.
        rule: how.
        base: the model that it was made from, whose shards `like_input` follows.

    Raises:
        UnsupportedError: more shards than names allow.
    """
    rule.check()
    tensors = list(whole.tensors.values())
    if rule.like_input:
        # A tensor that the input does not have stays with the first ones.
        homes = {name: i for i, shard in enumerate(base.shards) for name in shard.tensors}
        shares = [[tensor for tensor in tensors if homes.get(tensor.name, 0) == i] for i in range(len(base.shards))]
    elif rule.max_tensors:
        shares = [tensors[i : i + rule.max_tensors] for i in range(0, len(tensors), rule.max_tensors)]
    else:
        shares, room = [[]], rule.max_bytes
        for tensor in tensors:
            size = _padded(tensor.n_bytes, whole.alignment)
            if size > room and shares[-1]:
                shares.append([])
                room = rule.max_bytes
            shares[-1].append(tensor)
            room -= size
    if len(shares) > MAX_SHARDS:
        raise UnsupportedError(f"that would be {len(shares)} shards; at most {MAX_SHARDS} are written")
    return shares


def shard_name(name: str, number: int, count: int) -> str:
    """Name of shard `number` (from 0) of a file called `name`."""
    stem = name.removesuffix(".gguf")
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def is_shard_name(name: str) -> bool:
    """Whether a file name is that of a shard."""
    return _SHARD.search(name.removesuffix(".gguf")) is not None


def existing_shards(path: Path) -> list[Path]:
    """Shards of a file of that name, of any count, that exist."""
    stem = re.escape(path.name.removesuffix(".gguf"))
    pattern = re.compile(rf"{stem}-\d{{5}}-of-\d{{5}}\.gguf")
    return sorted(file for file in path.parent.iterdir() if pattern.fullmatch(file.name)) if path.parent.is_dir() else []


def write_shards(whole: GgufFile, shares: Sequence[Sequence[TensorInfo]], folder: Path, name: str) -> list[Path]:
    """Cut a file; the whole stays.

    Args:
        whole: what is cut.
        shares: the tensors of each shard.
        folder: where the shards go; none of them exists.
        name: of the whole, with `.gguf`.

    Returns:
        The shards, first one first.
    """
    paths = [folder / shard_name(name, i, len(shares)) for i in range(len(shares))]
    for i, (path, tensors) in enumerate(zip(paths, shares, strict=True)):
        _write_shard(whole, path, tensors, i, len(shares))
    return paths


def in_one_piece(path: Path, work: Path) -> GgufFile:
    """A model as one file: itself, or its shards put together in the folder `work`.

    What was cut by `write_shards` comes back byte for byte.
    """
    model = GgufModel(path)
    if len(model.shards) == 1:
        return model.first
    whole = work / "whole.gguf"
    _write(model.first, whole, list(model.tensors.values()), _entries(model.first))
    return GgufFile(whole)


def _write_shard(whole: GgufFile, path: Path, tensors: Sequence[TensorInfo], number: int, count: int) -> None:
    entries = _entries(whole) if number == 0 else []
    # In this order: llama-gguf-split sets the count anew when it is known, which moves it behind the others.
    entries.append(_entry("split.no", GGUFValueType.UINT16, "<H", number))
    entries.append(_entry("split.tensors.count", GGUFValueType.INT32, "<i", len(whole.tensors)))
    entries.append(_entry("split.count", GGUFValueType.UINT16, "<H", count))
    _write(whole, path, tensors, entries)


def _entries(file: GgufFile) -> list[bytes]:
    """The metadata of a file, without what says how it is cut."""
    return [file.raw(field.start, field.end) for key, field in file.fields.items() if not key.startswith(SPLIT)]


def _write(like: GgufFile, path: Path, tensors: Sequence[TensorInfo], entries: Sequence[bytes]) -> None:
    infos, offset, alignment = [], 0, like.alignment
    for tensor in tensors:
        label = tensor.name.encode()
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        infos.append(struct.pack("<Q", len(label)) + label + shape + struct.pack("<IQ", tensor.ggml_type, offset))
        offset += _padded(tensor.n_bytes, alignment)
    head = b"GGUF" + struct.pack("<IQQ", like.version, len(tensors), len(entries)) + b"".join(entries) + b"".join(infos)
    with path.open("xb", buffering=0) as out:
        write_all(out.fileno(), head + b"\0" * (-len(head) % alignment), 0)
        position = _padded(len(head), alignment)
        for tensor in tensors:
            copy_tensor(tensor, out.fileno(), position)
            position += _padded(tensor.n_bytes, alignment)
        out.truncate(position)  # the padding behind the last tensor


def _entry(key: str, kind: GGUFValueType, layout: str, value: int) -> bytes:
    name = key.encode()
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + struct.pack(layout, value)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
