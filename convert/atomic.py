"""Files appear whole or not at all: write to a temporary name in the same folder, flush, then rename."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant_grids.errors import QGuardError

PREFIX = ".qguard-"


class OutputError(QGuardError):
    """The output cannot be written where the user wants it."""


def temporary_beside(path: Path) -> Path:
    """An unused hidden name in `path`'s folder, so that the final rename stays on one file system."""
    return path.with_name(f"{PREFIX}{secrets.token_hex(4)}-{path.name}.tmp")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success flush it to disk and rename it to `path`, on any error remove it.

    Raises:
        OutputError: the folder does not exist or cannot be written.
    """
    check_writable(path)
    temporary = temporary_beside(path)
    try:
        yield temporary
        commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse an output path before any work is done.

    Raises:
        OutputError: its folder does not exist or cannot be written, or the path is a folder.
    """
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"the output folder {folder} does not exist; create it or choose another with --outfile")
    if path.is_dir():
        raise OutputError(f"the output {path.name} is a folder; give a file name with --outfile")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"the output folder {folder} cannot be written; choose another with --outfile")


def commit(temporary: Path, path: Path) -> None:
    """Flush `temporary` to disk and rename it to `path` in one step."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
