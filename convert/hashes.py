"""SHA-256 of files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from convert.reading import open_file

_CHUNK = 1 << 22


def sha256_of(paths: Iterable[Path]) -> str:
    """SHA-256 of the files' bytes, one after the other, as hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with open_file(path) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
