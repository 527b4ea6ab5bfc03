"""The paths that a command writes: checked once, together, and held for the run.

A path may be written if it is no input of the command, no other output of it, no folder, FIFO or device, if nothing of that
name exists (or `--overwrite` was given), and if its folder can be written. `check_outputs` says so before any work is done.

`reserve` then holds the names. Each has a lock file beside it, on which the operating system keeps an exclusive lock for as
long as the process lives, however it ends:

    .qguard-NAME.lock            whoever holds it may write NAME; removed at the end
    .qguard-NAME.01234567.tmp    NAME while it is written (`convert.atomic`)
    .qguard-NAME.01234567.work   folder for what comes before NAME
    .qguard-NAME.01234567.old    a folder NAME, in the moment in which it is replaced

So two runs cannot write one name, and what a killed run has left is known for what it is: a lock file that nobody holds. The
next run that reserves a name in the same folder removes it, with everything that goes with it, and says so in one line.
"""

import errno
import importlib.util
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from convert.atomic import PREFIX, UNFINISHED, OutputError, check_writable, own_key

_log = logging.getLogger(__name__)
_held: set[Path] = set()
_CAN_LOCK = importlib.util.find_spec("fcntl") is not None  # elsewhere names are checked, and not held
_LOCK = re.compile(rf"^{re.escape(PREFIX)}(?P<key>.+)\.lock$")
_SHARD = re.compile(r"^(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf$")
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


@dataclass(frozen=True)
class Written:
    """A path that a command writes.

    Attributes:
        path: the final name.
        option: of the command line that names it, for the way out in messages.
    """

    path: Path
    option: str = "--outfile"


def check_outputs(written: Sequence[Written], inputs: Iterable[Path | str | None], *, overwrite: bool) -> None:
    """Hold every path that a command writes against the rule of this module, before any work is done.

    Args:
        written: all of them.
        inputs: files and folders that the command reads; what does not exist (a hub id, say) is passed over.
        overwrite: whether existing files may be replaced; never an input.

    Raises:
        OutputError: naming the first path that may not be written, and the way out.
    """
    read = _identities(inputs)
    names: dict[Path, Written] = {}
    for one in written:
        path, option = one.path, one.option
        check_writable(path, option)
        other = names.setdefault(path.parent.resolve() / path.name, one)
        if other is not one:
            raise OutputError(f"{other.option} and {option} are the same file, {path.name}; give each a name of its own")
        if not path.exists() and not path.is_symlink():
            continue
        if path.exists():
            source = read.get(_identity(path))
            if source is not None:
                raise OutputError(
                    f"input and output are the same file, {path.name}, which would be lost; choose another with {option}"
                )
            if not path.is_file():
                raise OutputError(f"the output {path.name} is not a regular file; choose another with {option}")
        if not overwrite:
            raise OutputError(f"{path.name} exists; pass --overwrite to replace it or choose another with {option}")


def check_not_inside(folder: Path, inputs: Iterable[Path | str | None]) -> None:
    """Refuse to replace a folder that holds an input.

    Raises:
        OutputError: naming the input.
    """
    place = folder.resolve()
    for one in inputs:
        if one is not None and Path(one).exists() and Path(one).resolve().is_relative_to(place):
            raise OutputError(
                f"the input {Path(one).name} lies in the output folder {folder.name} and would be lost; choose another with "
                "--outfile"
            )


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _identities(inputs: Iterable[Path | str | None]) -> dict[tuple[int, int], Path]:
    """The files that inputs consist of, links followed: all shards of a split model, the files of a model folder."""
    found: dict[tuple[int, int], Path] = {}
    for one in inputs:
        if one is None:
            continue
        given = Path(one).expanduser()
        with suppress(OSError, ValueError):
            for path in files_of(given):
                with suppress(OSError):
                    found[_identity(path)] = path
    return found


def files_of(path: Path) -> Iterable[Path]:
    """The files that an input consists of: all shards of a split model, the files of a model folder."""
    if path.is_dir():
        # A converted file may lie beside the model that it was made from: no model folder is read for its GGUFs.
        return [file for file in path.iterdir() if file.suffix.lower() != ".gguf"]
    match = _SHARD.match(path.name)
    if match is None:
        return [path]
    return sorted({path, *path.parent.glob(f"{_literal(match['stem'])}-[0-9][0-9][0-9][0-9][0-9]-of-{match['count']}.gguf")})


def _literal(text: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", text)


@contextmanager
def reserve(paths: Iterable[Path]) -> Iterator[None]:
    """Hold names for the run, so that no other run writes them meanwhile; sweeps their folders first.

    Args:
        paths: final names of files or folders; their parents exist.

    Raises:
        OutputError: another run is writing one of them, or a name is given twice.
    """
    wanted = list(paths)
    for folder in dict.fromkeys(path.parent for path in wanted):
        sweep(folder)
    with ExitStack() as held:
        for path in wanted:
            lock = path.parent / f"{PREFIX}{own_key(path.name)}.lock"
            held.enter_context(_locked(lock, path.name))
        yield


@contextmanager
def writing(written: Sequence[Written], inputs: Iterable[Path | str | None], *, overwrite: bool) -> Iterator[None]:
    """Check the paths that a command writes, and hold them until the block ends; arguments and errors as above."""
    read = list(inputs)
    check_outputs(written, read, overwrite=overwrite)
    with reserve([one.path for one in written]):
        check_outputs(written, read, overwrite=overwrite)  # a run that has just ended may have written one
        yield


@contextmanager
def _locked(lock: Path, name: str) -> Iterator[None]:
    file = _take(lock)
    if file is None:
        raise OutputError(
            f"{name} is being written already, by another run or as another output of this one; choose another name"
        )
    _held.add(lock)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        _held.discard(lock)
        os.close(file)


def _take(lock: Path) -> int | None:
    """Open a lock file and lock it; None if somebody else holds it."""
    while True:
        try:
            file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise OutputError(f"the output folder {lock.parent} cannot be written: {error.strerror}") from error
        try:
            if _CAN_LOCK:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have removed it between the two calls: then this lock is nobody's.
            if os.path.samestat(os.fstat(file), os.lstat(lock)):
                return file
        except BlockingIOError:
            os.close(file)
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:  # a file system without locks
                return file
            os.close(file)
            raise OutputError(f"{lock.parent} cannot be locked: {error.strerror}") from error
        os.close(file)


def sweep(folder: Path) -> int:
    """Remove what killed runs have left in a folder; logs one line if there was anything.

    Returns:
        How many files and folders were removed, lock files not counted.
    """
    removed = n_bytes = 0
    if not _CAN_LOCK:
        return 0
    for name in _names(folder):
        match = _LOCK.match(name)
        if match is None:
            continue
        with suppress(OSError, OutputError):  # another run may remove it meanwhile
            file = _take(folder / name) if _is_ours(folder / name) else None
            if file is None:
                continue
            try:
                left = re.compile(rf"^{re.escape(PREFIX + match['key'])}\.[0-9a-f]{{8}}\.(tmp|work|old)$")
                for path in [folder / other for other in _names(folder) if left.match(other)]:
                    if path.suffix == ".old" and not os.path.lexists(folder / match["key"]):
                        path.rename(folder / match["key"])
                        continue
                    n_bytes += _size(path)
                    _remove(path)
                    removed += 1
                (folder / name).unlink()
            finally:
                os.close(file)
    if removed:
        _log.warning("removed %d unfinished files (%.1f MB) of runs that were killed", removed, n_bytes / 1e6)
    return removed


def remove_unfinished() -> None:
    """Remove what this process is writing, and its locks: for a thread that is about to end the process.

    What cannot be removed now (a child process may still write it) keeps its lock file, and so is swept by the next run.
    """
    for path in tuple(UNFINISHED):
        with suppress(OSError):
            _remove(path)
    if not any(map(os.path.lexists, tuple(UNFINISHED))):
        for lock in tuple(_held):
            with suppress(OSError):
                lock.unlink()


def _is_ours(lock: Path) -> bool:
    """A regular file of this user's: in a folder that many users write, such as the temporary one, theirs are left alone."""
    found = os.lstat(lock)
    return stat.S_ISREG(found.st_mode) and (not hasattr(os, "geteuid") or found.st_uid == os.geteuid())


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir() if path.name.startswith(PREFIX)]
    except OSError:
        return []


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()
