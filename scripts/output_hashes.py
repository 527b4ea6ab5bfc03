"""What an output of `qguard-edge` is made of, as hashes, and what differs between two of them.

Imports nothing of the project, so that a mistake in its own reader or writer cannot hide a difference:
GGUF files are read with llama.cpp's `gguf` package.

Each file becomes a list of *parts*, a name and a hash, in the file's order. Parts whose names begin with `NOTED` say how the
file was made (`qguard.*` metadata, README.md): they may change when the program does, so they are listed and not judged.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOTED = "note: "
_RECORDS = {"README.md": False, "qguard.json": True}  # what a folder says about itself: file name -> whether it is JSON
_COUNTS = ("GGUF.kv_count",)  # changes with the number of noted keys
_CHUNK = 1 << 24

Parts = Mapping[str, str]


@dataclass(frozen=True)
class Difference:
    """How one output differs from another.

    Attributes:
        parts: judged parts that differ or that only one of them has, tensors and files by name.
        noted: parts that differ and are not judged.
    """

    parts: tuple[str, ...]
    noted: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether every judged part is the same."""
        return not self.parts


def parts_of(path: Path) -> Parts:
    """Hashes of everything in an output.

    Args:
        path: a GGUF, a .safetensors file, or a folder of a model.

    Raises:
        FileNotFoundError: there is no such output.
    """
    if path.is_dir():
        return dict(_folder_parts(path))
    if path.suffix == ".gguf":
        return dict(_gguf_parts(path))
    if path.suffix == ".safetensors":
        return dict(_safetensors_parts(path))
    return {path.name: _file_hash(path, 0)}


def compare_parts(old: Parts, new: Parts) -> Difference:
    """What differs; parts in another order differ too."""
    names = list(dict.fromkeys([*old, *new]))
    differ = [name for name in names if old.get(name) != new.get(name)]
    parts = [name for name in differ if not name.startswith(NOTED)]
    if not parts and _judged(old) != _judged(new):
        parts = ["order of the parts"]
    noted = [name.removeprefix(NOTED) for name in differ if name.startswith(NOTED)]
    return Difference(tuple(parts), tuple(noted))


def overall_hash(parts: Parts) -> str:
    """One hash of all judged parts; the data section's own if the output is one GGUF file."""
    text = json.dumps(_judged(parts))
    return parts.get("data section") or hashlib.sha256(text.encode()).hexdigest()


def _judged(parts: Parts) -> Sequence[tuple[str, str]]:
    return [(name, value) for name, value in parts.items() if not name.startswith(NOTED)]


def _gguf_parts(path: Path) -> Iterator[tuple[str, str]]:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    yield "data section", _file_hash(path, reader.data_offset)
    for key, field in reader.fields.items():
        if key.startswith("qguard."):
            yield f"{NOTED}{key}", _shown(field.contents())
        elif key not in _COUNTS:
            yield f"metadata {key}", hashlib.sha256(b"".join(part.tobytes() for part in field.parts)).hexdigest()
    for tensor in reader.tensors:
        shape = "x".join(str(size) for size in tensor.shape)
        place = tensor.data_offset - reader.data_offset
        value = hashlib.sha256(tensor.data.tobytes()).hexdigest()
        yield f"tensor {tensor.name}", f"{value} {tensor.tensor_type.name} {shape} at {place}"


def _safetensors_parts(path: Path) -> Iterator[tuple[str, str]]:
    """A plan: the header's `__metadata__` tells how it was made, so it is noted."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for key, value in header.pop("__metadata__", {}).items():
        yield f"{NOTED}{key}", _shown(value)
    yield "header", hashlib.sha256(json.dumps(header).encode()).hexdigest()
    yield "data section", _file_hash(path, 8 + size)


def _folder_parts(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file; whole, so that the headers of weight files count too."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        if name not in _RECORDS:
            yield f"file {name}", _file_hash(path, 0)
        elif _RECORDS[name]:
            for key, value in json.loads(path.read_text(encoding="utf-8")).items():
                yield f"{NOTED}{name} {key}", _shown(value)
        else:
            yield f"{NOTED}{name}", _file_hash(path, 0)


def _file_hash(path: Path, start: int) -> str:
    made = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(_CHUNK):
            made.update(chunk)
    return made.hexdigest()


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)
