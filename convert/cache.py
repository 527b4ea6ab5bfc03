"""Where things are kept between runs: one folder per purpose, entries that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder(purpose: str) -> Path:
    """`$QGUARD_CACHE/PURPOSE`, or the same in the platform's cache folder; it may not exist yet."""
    if "QGUARD_CACHE" in os.environ:
        return Path(os.environ["QGUARD_CACHE"]) / purpose
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qguard-edge" / purpose


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` when the block ends well, so that it appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
