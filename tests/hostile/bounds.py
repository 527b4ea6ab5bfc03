"""What a machine may refuse a command: memory, open files, the size of a file, a full disk.

A command line may begin with conditions, `@NAME=VALUE`: `@AS`, `@NOFILE` and `@FSIZE` are limits of the process (those of memory
and files are what it has already and so much more), `@TMPDIR` is its temporary folder. A full disk is a small tmpfs of the
campaign's own, where the system lets it mount one; elsewhere the largest size of a file takes its place.
"""

import ctypes
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
DISK = "disk"


def with_conditions(command: list[str]) -> list[str]:
    """Put the conditions of a command line into force, for this process and its children; what is left of the line."""
    while command[0].startswith("@"):
        name, _, value = command[0][1:].partition("=")
        if name == "TMPDIR":
            os.environ["TMPDIR"] = tempfile.tempdir = value
        else:
            has = 0
            if name == "AS":
                has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            if name == "NOFILE":
                has = len(list(Path("/proc/self/fd").iterdir()))
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (has + int(value), has + int(value)))
        command = command[1:]
    return command


def mounts_of_its_own() -> bool:
    """Let this process mount what no other process sees, and what ends with it; whether that is permitted."""
    if ctypes.CDLL(None).unshare(NEW_MOUNTS) != 0:
        return False
    return subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False).returncode == 0


def small_disk(folder: Path, size: int) -> bool:
    """Mount a tmpfs of so many bytes on a folder that is made; whether there is one now."""
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(line, capture_output=True, check=False).returncode == 0


@contextmanager
def unmounted(folder: Path) -> Iterator[None]:
    """Afterwards, nothing is mounted there any more."""
    try:
        yield
    finally:
        if folder.is_mount():
            subprocess.run(["umount", str(folder)], check=True)
