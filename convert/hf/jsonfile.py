"""JSON files of a checkpoint, read as what they are: input from a stranger.

A model folder is a download. Its JSON files decide sizes, loops and file names, so they are read through this
module only: a limit on bytes before parsing, a JSON object at the top, and typed accessors that say which
file, which key and which range when a value is not what the format promises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.reading import check_inside, read_file
from quant_grids.errors import FormatError

MAX_CONFIG_BYTES = 16 << 20
"""A config.json is a few kilobytes; sixteen megabytes is far beyond any real one."""

MAX_TOKENIZER_BYTES = 256 << 20
"""The largest tokenizer.json in use (262 144 tokens with their merges) is about 35 MB."""

MAX_DIMENSION = 1 << 24
"""No width, head count, layer count or vocabulary of a real model comes near sixteen million."""


def read_bytes(path: Path, limit: int) -> bytes:
    """Reads a whole small file after checking its size.

    Args:
        path: The file.
        limit: Largest size accepted, in bytes.

    Raises:
        FormatError: The file is missing, unreadable, larger than `limit`, or a link that leads out of its folder.
    """
    try:
        if path.is_symlink():
            check_inside(path.parent, path)
        return read_file(path, limit)
    except OSError as error:
        raise FormatError(f"Cannot read {path}: {error.strerror or error}.") from error


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Reads a file that must hold one JSON object.

    Args:
        path: The file.
        limit: Largest size accepted, in bytes.

    Raises:
        FormatError: Too large, not UTF-8 JSON, nested beyond the parser's depth, or not an object.
    """
    return parse_json(read_bytes(path, limit), path.name)


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    """Parses the bytes of a file that must hold one JSON object; raises FormatError naming the file otherwise."""
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name} is not valid JSON: {type(error).__name__}: {error}.") from error
    if not isinstance(value, dict):
        raise FormatError(f"{name} must hold a JSON object, not a {type(value).__name__}.")
    return value


def read_optional_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Like `read_json`, but a file that does not exist reads as an empty object."""
    return read_json(path, limit) if path.exists() else {}


@dataclass(frozen=True)
class Section:
    """A JSON object with typed, range-checked access.

    Attributes:
        values: The object's members.
        origin: How messages name it, such as `config.json` or `config.json: rope_parameters`.
    """

    values: Mapping[str, Any]
    origin: str

    def _first(self, names: Sequence[str]) -> tuple[str, Any]:
        for name in names:
            if self.values.get(name) is not None:
                return name, self.values[name]
        return names[0], None

    def has(self, name: str) -> bool:
        """Says whether the key is there with a value other than null."""
        return self.values.get(name) is not None

    def integer(self, *names: str, default: int | None = None, low: int = 1, high: int = MAX_DIMENSION) -> int:
        """The first of `names` that has a value, as an integer in `low..high`.

        Args:
            *names: The key and its older spellings, in order of preference.
            default: Taken when none of them is there; without one, that is an error.
            low: Smallest value accepted.
            high: Largest value accepted.

        Raises:
            FormatError: Missing without a default, not an integer, or outside the range.
        """
        name, value = self._first(names)
        if value is None:
            value = default
        if value is None:
            raise FormatError(f"{self.origin} has no {name}.")
        if isinstance(value, bool) or not isinstance(value, int):
            raise FormatError(f"{self.origin}: {name} must be an integer, not {value!r:.80}.")
        if not low <= value <= high:
            raise FormatError(f"{self.origin}: {name} is {value}, outside {low}..{high}.")
        return value

    def real(self, *names: str, default: float | None = None) -> float:
        """The first of `names` that has a value, as a finite float; raises FormatError otherwise."""
        name, value = self._first(names)
        if value is None:
            value = default
        if value is None:
            raise FormatError(f"{self.origin} has no {name}.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FormatError(f"{self.origin}: {name} must be a finite number, not {value!r:.80}.")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean key, or `default` when it is missing; raises FormatError for anything else."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise FormatError(f"{self.origin}: {name} must be true or false, not {value!r:.80}.")
        return value

    def text(self, *names: str, default: str | None = None) -> str:
        """The first of `names` that has a value, as a string; raises FormatError otherwise."""
        name, value = self._first(names)
        if value is None:
            value = default
        if not isinstance(value, str):
            raise FormatError(f"{self.origin}: {name} must be a string, not {value!r:.80}.")
        return value

    def reals(self, name: str, count: int) -> list[float]:
        """A list of exactly `count` finite numbers; raises FormatError otherwise."""
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) != count:
            raise FormatError(f"{self.origin}: {name} must be a list of {count} numbers.")
        if not all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value):
            raise FormatError(f"{self.origin}: {name} holds something that is not a finite number.")
        return [float(x) for x in value]

    def section(self, name: str) -> Section:
        """A nested object (empty when the key is missing); raises FormatError for anything else."""
        value = self.values.get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise FormatError(f"{self.origin}: {name} must be an object, not {value!r:.80}.")
        return Section(value, f"{self.origin}: {name}")
