"""The `general.*` metadata: what the model is called, who made it, under which licence.

gguf's own `Metadata` knows how to read a model card and to take a hub id apart into name, size and version.
Its input comes from the model folder, so what it finds is checked here: only text where text belongs, and
nothing that looks like a path on somebody's disk.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import yaml  # safe_load only

from convert.hf.jsonfile import Section, read_bytes, read_optional_json
from quant_grids.errors import FormatError

MAX_CARD_BYTES = 4 << 20
MAX_TEXT = 4096
_LISTS = ("tags", "languages")
_RECORDS = ("base_models", "datasets")
_SAMPLING = {"top_k": "sampling_top_k", "top_p": "sampling_top_p", "min_p": "sampling_min_p", "temperature": "sampling_temp"}


def general_metadata(folder: Path, config: Section, name: str | None, parameters: int) -> gguf.Metadata:
    """Collects the general metadata of a model folder.

    Args:
        folder: The model folder.
        config: config.json.
        name: The model's name or hub id, if the caller knows it (a download cache's folder is named by a
            hash).
        parameters: Number of parameters, to tell a size in a name from a context length.
    """
    own = config.values.get("_name_or_path")
    model_id = name or (own if isinstance(own, str) and _is_public(own) and own.count("/") <= 1 else folder.resolve().name)
    metadata = gguf.Metadata()
    card = _read_card(folder)
    metadata = gguf.Metadata.apply_metadata_heuristic(metadata, card, {"_name_or_path": model_id}, None, parameters)
    _clean(metadata)
    if not metadata.name:
        metadata.name = Path(model_id).name.replace("-", " ")
    generation = read_optional_json(folder / "generation_config.json")
    for key, field in _SAMPLING.items():
        value = generation.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6:
            setattr(metadata, field, int(value) if key == "top_k" else float(value))
    return metadata


def _read_card(folder: Path) -> dict[str, Any]:
    """The YAML head of README.md; a card that cannot be read is a card that says nothing."""
    path = folder / "README.md"
    if not path.exists() or path.stat().st_size > MAX_CARD_BYTES:
        return {}
    try:
        text = read_bytes(path, MAX_CARD_BYTES).decode("utf-8")
    except (FormatError, UnicodeDecodeError):
        return {}
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    head = []
    for line in lines[1:]:
        if line.strip() == "---":
            break
        head.append(line)
    try:
        card = yaml.safe_load("\n".join(head))
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    if not isinstance(card, dict):
        return {}
    return {key: _public_part(value) for key, value in card.items() if isinstance(key, str)}


def _public_part(value: Any) -> Any:
    """A card's value without the strings that are paths; a list of licences becomes one string later."""
    if isinstance(value, str):
        return value if _is_public(value) else None
    if isinstance(value, list):
        return [item for item in value[:256] if not isinstance(item, str) or _is_public(item)]
    return value


def _is_public(text: str) -> bool:
    """False for anything that looks like a place on a disk rather than a name."""
    return not (text.startswith(("/", "~", ".", "\\", "file:")) or "\\" in text or text[1:3] == ":/")


def _text(value: Any) -> str | None:
    """A short public string, or None."""
    return value if isinstance(value, str) and 0 < len(value) <= MAX_TEXT and _is_public(value) else None


def _clean(metadata: gguf.Metadata) -> None:
    """Drops every value of the wrong kind, in place."""
    for field in dataclasses.fields(metadata):
        value = getattr(metadata, field.name)
        if value is None or field.name.startswith("sampling_"):
            continue
        if field.name in _LISTS:
            kept = [text for text in value if _text(text)] if isinstance(value, list) else []
            setattr(metadata, field.name, kept[:256] or None)
        elif field.name in _RECORDS:
            records = [_record(entry) for entry in value if isinstance(entry, dict)]
            setattr(metadata, field.name, [entry for entry in records if entry][:64] or None)
        elif isinstance(value, list):
            setattr(metadata, field.name, _text(", ".join(item for item in value if isinstance(item, str))))
        else:
            setattr(metadata, field.name, _text(value))


def _record(entry: dict[Any, Any]) -> dict[str, str]:
    """A base model or data set with its public text fields only."""
    return {key: value for key, value in entry.items() if isinstance(key, str) and _text(value)}
