"""What goes over the pipes between a program and the child process that holds its model.

A message is 9 bytes, kind and size (little-endian), and `size` bytes:

    parent to child   RESULT    a request, JSON
    child to parent   PROGRESS  nothing: it is still at work
                      RESULT    numbers or text, laid out as the request says
                      REFUSED   why not, UTF-8

The child reads files of strangers, so the parent trusts nothing that comes from it: there is no format to parse but this one,
and whoever asks says beforehand how large the reply may be.
"""

import json
import struct
from collections.abc import Callable, Mapping
from typing import IO, Any

_START = struct.Struct("<BQ")
PROGRESS, RESULT, REFUSED = range(3)
SHORT = 1 << 16
LONGEST_READ = 1 << 24


class WireError(Exception):
    """A message is not what it must be; without words: the other side is gone."""


def send(stream: IO[bytes], kind: int, content: bytes | memoryview = b"") -> None:
    """Write one message to an unbuffered stream; `content` as bytes."""
    start = _START.pack(kind, len(content))
    if len(content) <= SHORT:
        _write(stream, start + bytes(content))  # one system call
    else:
        _write(stream, start)
        _write(stream, content)


def _write(stream: IO[bytes], content: bytes | memoryview) -> None:
    view = memoryview(content)
    while view:
        view = view[stream.write(view) :]


def receive(stream: IO[bytes]) -> Mapping[str, Any]:
    """In the child: the next request.

    Raises:
        WireError: there is none.
    """
    _, size = read_start(stream)
    content = bytearray(size)
    read_into(stream, memoryview(content))
    request: Mapping[str, Any] = json.loads(content)
    return request


def read_start(stream: IO[bytes]) -> tuple[int, int]:
    """Kind and size of the next message.

    Raises:
        WireError: the other side is gone.
    """
    start = bytearray(_START.size)
    read_into(stream, memoryview(start))
    kind, size = _START.unpack(start)
    return int(kind), int(size)


def read_into(stream: IO[bytes], space: memoryview, on_part: Callable[[], None] = lambda: None) -> None:
    """Fill `space` (bytes) from an unbuffered stream.

    Args:
        stream: a pipe.
        space: to be filled.
        on_part: called whenever something came.

    Raises:
        WireError: the other side is gone.
    """
    while space:
        count = stream.readinto(space[:LONGEST_READ])  # type: ignore[attr-defined]
        if not count:
            raise WireError
        on_part()
        space = space[count:]
