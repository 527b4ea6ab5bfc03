"""Files and folders appear whole or not at all: write to a temporary name in the same folder, flush, then rename."""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant_grids.errors import QGuardError

PREFIX = ".qguard-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
UNFINISHED: set[Path] = set()
"""Temporary files and work folders that this process is writing: what `convert.outputs.remove_unfinished` removes."""
LONGEST_KEY = 200  # bytes; file systems allow 255 for a name


class OutputError(QGuardError):
    """The output cannot be written where the user wants it."""


def own_key(name: str) -> str:
    """What the hidden names of an output called `name` have in common: the name, or its hash if it is long."""
    return name if len(os.fsencode(name)) <= LONGEST_KEY else hashlib.sha256(os.fsencode(name)).hexdigest()


def temporary_beside(path: Path, suffix: str = "tmp") -> Path:
    """An unused hidden name in `path`'s folder, so that the final rename stays on one file system."""
    return path.with_name(f"{PREFIX}{own_key(path.name)}.{secrets.token_hex(4)}.{suffix}")


@contextmanager
def atomic_path(path: Path, *, key: str | None = None) -> Iterator[Path]:
    """Yield a temporary path; on success flush it to disk and rename it to `path`, on any error remove it.

    Args:
        path: the final name.
        key: what the temporary name is made of; default: the final name.

    Raises:
        OutputError: the folder does not exist or cannot be written.
    """
    check_writable(path)
    temporary = temporary_beside(path.with_name(key or path.name))
    UNFINISHED.add(temporary)
    try:
        with _named(path):
            yield temporary
            commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        UNFINISHED.discard(temporary)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which output a full disk is about: the system's own error often names no file."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutputError(f"{path.name} cannot be written: {error.strerror} ({path.parent}); make room there") from error
        raise


def check_writable(path: Path, option: str = "--outfile") -> None:
    """Refuse an output path before any work is done.

    Args:
        path: to be written later.
        option: of the command line that names it, for the way out in the message.

    Raises:
        OutputError: its folder does not exist or cannot be written, or the path is a folder.
    """
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"the output folder {folder} does not exist; create it or choose another with {option}")
    if path.is_dir():
        raise OutputError(f"the output {path.name} is a folder; give a file name with {option}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"the output folder {folder} cannot be written; choose another with {option}")


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


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside the output `path`, removed at the end, so that the final rename stays on one file system."""
    folder = temporary_beside(path, "work")
    UNFINISHED.add(folder)
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise OutputError(f"the output folder {path.parent} cannot be written: {error.strerror}") from error
    try:
        with _named(path):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        UNFINISHED.discard(folder)


def commit_folder(temporary: Path, path: Path) -> None:
    """Flush a folder's files to disk and rename it to `path`, replacing a folder of that name."""
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    temporary.chmod(0o755)  # the work folder's own mode is private
    if path.exists():
        old = temporary_beside(path, "old")  # `convert.outputs.sweep` gives it its name back after a kill at this moment
        path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(path)


def check_folder_writable(path: Path, *, overwrite: bool, marker: str) -> None:
    """Refuse an output folder before any work is done.

    Args:
        path: to be written later.
        overwrite: replace a folder of that name.
        marker: a file that a folder must hold to be replaced (`config.json` of a model): a mistyped name must not cost a
            folder of something else.

    Raises:
        OutputError: the parent cannot be written, or the path exists and may not be replaced.
    """
    parent = path.parent
    if not parent.is_dir():
        raise OutputError(f"the output folder {parent} does not exist; create it or choose another with --outfile")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"the output folder {parent} cannot be written; choose another with --outfile")
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise OutputError(f"{path.name} exists; pass --overwrite to replace it or choose another with --outfile")
    if path.is_symlink() or not path.is_dir() or (any(path.iterdir()) and not (path / marker).is_file()):
        raise OutputError(
            f"{path.name} is not a model folder ({marker} is not in it) and will not be replaced; choose another name"
        )
