"""Write a Hugging Face model folder: weights in shards as they come, then the small files, config.json last.

One shard is in memory at a time. Shards get their final names at the end, when their number is known. A folder without
config.json is no model to anyone, so a write that stops half-way leaves nothing that looks complete, even under the hidden
name that `convert.atomic.commit_folder` gives it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from convert.atomic import OutputError
from convert.hf.checkpoint import INDEX_NAME
from convert.hf.jsonfile import MAX_TOKENIZER_BYTES, parse_json
from convert.reading import check_folder, read_file

SHARD_BYTES = 2 << 30
CONFIG_NAME = "config.json"
RECORD_NAME = "qguard.json"  # what was done to a hardened folder
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
"""What belongs to a model beside its weights. Code (`*.py`) and pickles are never copied."""


class ShardWriter:
    """Collects tensors and writes a shard whenever the next tensors would make it too large.

    Args:
        folder: an empty folder.
        shard_bytes: size of a shard at most; a tensor larger than that gets one of its own.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._written: set[str] = set()

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors that belong together: they land in one shard.

        Raises:
            OutputError: a name was added before, or the disk is full.
        """
        twice = self._written & tensors.keys()
        if twice:
            raise OutputError(f"tensor {sorted(twice)[0]!r} would be written twice; the checkpoint's names clash")
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._pending_bytes += size
        self.total_bytes += size
        self._written |= tensors.keys()

    def finish(self) -> tuple[Path, ...]:
        """Write the last shard and the index; the files, in order."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            only = self.folder / "model.safetensors"
            self._part(0).rename(only)
            return (only,)
        files = []
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = self.folder / f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(file)
            files.append(file)
            weight_map |= dict.fromkeys(names, file.name)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / INDEX_NAME, index)
        return tuple(files)

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.tmp"

    def _flush(self) -> None:
        if not self._pending:
            return
        part = self._part(len(self._shards))
        try:
            save_file(self._pending, part, metadata={"format": "pt"})
            part.chmod(0o644)  # safetensors makes it private
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"the weights cannot be written: {reason}") from error
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def copy_side_files(source: Path, folder: Path) -> tuple[str, ...]:
    """Copy tokenizer, chat template, generation settings and license; the names of the files that were there.

    Raises:
        OutputError: one cannot be copied.
        FormatError: one is larger than such a file may be, or a link that leads out of the folder.
    """
    check_folder(source)
    found = [source / name for name in SIDE_FILES]
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        found += sorted(templates.glob("*.jinja"))
    copied = []
    for path in found:
        if not path.is_file():
            continue
        name = str(path.relative_to(source))
        target = folder / name
        try:
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(_without_path(name, read_file(path, MAX_TOKENIZER_BYTES)))
        except OSError as error:
            raise OutputError(f"{name} cannot be copied: {error.strerror or error}") from error
        copied.append(name)
    return tuple(copied)


def _without_path(name: str, content: bytes) -> bytes:
    """The content of a side file, without the path at which an old transformers has made it."""
    if name != "tokenizer_config.json" or b'"name_or_path"' not in content:
        return content
    settings = {key: value for key, value in parse_json(content, name).items() if key != "name_or_path"}
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a small JSON file as transformers does: indented, keys in the order given."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
