"""Room on the disk, asked for before minutes are spent."""

import shutil
from pathlib import Path

from convert.atomic import OutputError
from convert.ftypes import FileType
from convert.sizes import size_text
from quant_grids.ggml_type import layout_of, type_named


def least_bytes(file_type: FileType, n_weights: int) -> int:
    """Bytes that a file of this type takes at least: mixtures give some tensors a larger type, hardly any a smaller one."""
    weights, n_bytes = layout_of(type_named(file_type.main)) or (1, 0)
    return n_weights // weights * n_bytes


def require_space(folder: Path, n_bytes: int, what: str) -> None:
    """Refuse to begin what cannot be finished for want of room.

    Args:
        folder: where it is to be written; exists.
        n_bytes: that are needed at least.
        what: is to be written, for the message.

    Raises:
        OutputError: there is less room than that.
    """
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise OutputError(
            f"{what} needs at least {size_text(n_bytes)} for the work and {size_text(free)} are free there; make room, or "
            "choose another place with -o"
        )
