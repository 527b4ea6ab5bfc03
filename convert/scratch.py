"""Files and folders that nobody asked for by name, and that no killed run leaves behind for good.

`convert.outputs` holds the names that a command writes. What is written beside them needs the same care: a base in the
system's temporary folder takes gigabytes, and a piece of work that was half written keeps its temporary name for ever. Both are
reserved here under a name that no other run has, so that the next run in that folder knows whether anybody still writes them.
"""

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convert.atomic import atomic_path, work_folder
from convert.outputs import reserve


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder in the system's temporary folder, removed at the end; sweeps what killed runs left there.

    Raises:
        OutputError: the temporary folder cannot be written, or its disk is full.
    """
    own = Path(tempfile.gettempdir()) / f"scratch-{secrets.token_hex(4)}"
    with reserve([own]), work_folder(own) as folder:
        yield folder


@contextmanager
def shared_path(path: Path) -> Iterator[Path]:
    """As `atomic_path`, for a file that several runs may make at once: it is the same whoever is last.

    Raises:
        OutputError: the folder does not exist or cannot be written, or its disk is full.
    """
    own = path.with_name(f"shared-{secrets.token_hex(4)}")
    with reserve([own]), atomic_path(path, key=own.name) as temporary:
        yield temporary
