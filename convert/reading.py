"""How files of foreign origin are opened: regular files only, never waiting, no more bytes than such a file may have.

A model folder is a download, and a download may hold links. Where a link leads out of the folder, reading it would put a file
of the user's into the output. So a link is judged by where its target lies: in the folder itself, or, for a folder of the
hub's cache (`models--OWNER--NAME/snapshots/COMMIT`), in that model's own store (`models--OWNER--NAME/blobs`).
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from quant_grids.errors import FormatError

_READ = {".safetensors", ".json", ".jinja", ".txt", ".model", ".md", ".py", ".bin", ".pt", ".pth", ".tiktoken", ".vocab"}
"""Endings of what is read from a model folder, by this program, by transformers or by llama.cpp's converter."""
_READ_BY_NAME = ("LICENSE", "LICENCE", "NOTICE", "README", "USE_POLICY")
_TEMPLATES = "additional_chat_templates"
_PIECE = 1 << 20  # bytes
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading; a FIFO or device is refused at once, where opening it could wait for ever.

    Raises:
        FormatError: it is no regular file.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else _KINDS.get(stat.S_IFMT(mode), "something else")
            raise FormatError(f"{path.name} is not a regular file but {kind}; give a file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_file(path: Path) -> None:
    """Refuse what is no regular file before another library opens it; a file that is not there is left to that library.

    Raises:
        FormatError: it is a FIFO, a device, a socket or a folder.
    """
    if path.exists():
        open_file(path).close()


def read_file(path: Path, limit: int) -> bytes:
    """Read a whole file.

    Args:
        path: the file.
        limit: the largest size accepted, in bytes.

    Raises:
        FormatError: it is larger, or no regular file.
        OSError: it cannot be read.
    """
    with open_file(path) as file:
        size, data = os.fstat(file.fileno()).st_size, bytearray()
        # A piece at a time: asked for `limit` bytes, Python sets so many aside, however small the file is.
        while size <= limit and len(data) <= limit and (piece := file.read(_PIECE)):
            data += piece
        if size > limit or len(data) > limit:
            raise FormatError(f"{path.name} is {max(size, len(data))} bytes, more than the {limit} such a file may have.")
        return bytes(data)


def read_text(path: Path, limit: int) -> str:
    """Read a whole UTF-8 file; errors as of `read_file`, and UnicodeDecodeError."""
    return read_file(path, limit).decode("utf-8")


def check_inside(folder: Path, path: Path) -> None:
    """Refuse a path whose target lies outside a model folder.

    Raises:
        FormatError: naming the file.
    """
    place, target = folder.resolve(), path.resolve()
    if target.is_relative_to(place):
        return
    if place.parent.name == "snapshots" and target.is_relative_to(place.parent.parent / "blobs"):
        return
    raise FormatError(
        f"{path.name} is a link that leads out of the model folder {folder.name}; a file there would end up in the output: put a "
        "copy of it into the folder if it belongs to the model"
    )


def check_folder(folder: Path) -> None:
    """Hold a model folder against the rule of this module, before anything in it is opened.

    Raises:
        FormatError: a file that could be read is a link that leads out of the folder, a FIFO, a socket or a device.
        OSError: the folder cannot be listed.
    """
    listed = list(folder.iterdir())
    templates = folder / _TEMPLATES
    if templates.is_dir():
        check_inside(folder, templates)
        listed += templates.iterdir()
    for path in listed:
        if path.suffix.lower() not in _READ and not path.name.upper().startswith(_READ_BY_NAME):
            continue
        if path.is_symlink():
            check_inside(folder, path)
        if path.exists() and not path.is_file() and not path.is_dir():
            require_file(path)
