"""Inputs that must stay what they are while a command reads them.

A conversion reads its base several times: to quantize, to choose, to measure, to hash. If the file is replaced or written
meanwhile, the output belongs to neither version. Size, time of change and inode are noted when the command begins and
compared before the output gets its name; the SHA-256 in the report is that of what was read.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from convert.outputs import files_of
from quant_grids.errors import QGuardError


class ChangedError(QGuardError):
    """An input changed while it was being read."""


class Pinned:
    """The files that inputs consist of, as they were when this was made.

    Args:
        inputs: files and folders; what does not exist (a hub id, say) is passed over.
    """

    def __init__(self, inputs: Iterable[Path | str | None]) -> None:
        self._files: dict[Path, tuple[int, ...]] = {}
        for one in inputs:
            if one is not None:
                with suppress(OSError, ValueError):
                    self._files |= {path: _facts(path) for path in files_of(Path(one).expanduser()) if path.is_file()}

    def check(self) -> None:
        """Refuse to go on if one of them is another file now.

        Raises:
            ChangedError: naming it.
        """
        for path, before in self._files.items():
            try:
                now = _facts(path)
            except OSError:
                now = ()
            if now != before:
                raise ChangedError(
                    f"{path.name} changed while it was being read, so the output would belong to neither version and was thrown "
                    "away; try again when nothing writes it"
                )


def _facts(path: Path) -> tuple[int, ...]:
    found: os.stat_result = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
