"""The command line in this process: what it says and how it exits, without the seconds that a new interpreter takes.

Where the process is the point (it is killed, its imports are counted, nothing may reach its standard error), tests start one.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from qguard_edge.cli import run


@dataclass(frozen=True)
class Done:
    """What a command left on its streams, native code's output included, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


class CommandLine(Protocol):
    """Runs `qguard-edge ARGUMENTS` in the folder `cwd` (the present one if None)."""

    def __call__(self, *arguments: str | Path, cwd: Path | None = None) -> Done: ...


def command_line(capfd: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line, its streams read through `capfd`."""

    def call(*arguments: str | Path, cwd: Path | None = None) -> Done:
        capfd.readouterr()
        with chdir(cwd or Path.cwd()), logging_as_in_a_process():
            code = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return call


@contextmanager
def logging_as_in_a_process() -> Iterator[None]:
    """Without pytest's handlers, so that the command sets up its own and warnings reach standard error."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def program(*arguments: str | Path) -> list[str]:
    """`qguard-edge ARGUMENTS` as a process of its own."""
    return [sys.executable, "-m", "qguard_edge", *map(str, arguments)]
