"""What a child process that runs llama.cpp may take: address space, and time without a sign of life."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from quant_grids.errors import QGuardError

MEMORY_VARIABLE, SECONDS_VARIABLE = "QGUARD_LLAMA_GIB", "QGUARD_LLAMA_SECONDS"
GIB = 1 << 30


class LlamaRuntimeError(QGuardError):
    """llama.cpp refused a file, could not decode, or its process ended."""


@dataclass(frozen=True)
class ChildLimits:
    """What a child may take.

    Attributes:
        memory: bytes of address space, memory-mapped files included; None: no limit.
        seconds: without a sign of life, such as a decoded batch; infinite for no limit.
    """

    memory: int | None
    seconds: float

    @classmethod
    def of(cls, path: Path, *, tokens: int = 0, threads: int = 1, more: float = 0.0, longer: float = 0.0) -> Self:
        """Generous ones for a GGUF, unless the environment sets others (0 for none).

        Memory: the files twice (mapped, and repacked), 8 GiB, 2 MiB for each token of the context, 160 MiB for each thread; but
        no more than the files, the machine's memory and 4 GiB. Time: ten minutes, and one for each GiB.

        Args:
            path: first shard of a split one.
            tokens: that the context holds.
            threads: of llama.cpp.
            more: bytes for work of the child's own; infinite for what the machine has.
            longer: seconds, beyond the others.

        Raises:
            LlamaRuntimeError: a variable of the environment is no number.
        """
        size = sum(file.stat().st_size for file in _files(path) if file.is_file())
        wanted = 2 * size + 8 * GIB + (tokens << 21) + threads * (160 << 20) + more
        gib = _number(MEMORY_VARIABLE, min(wanted, size + psutil.virtual_memory().total + 4 * GIB) / GIB)
        seconds = _number(SECONDS_VARIABLE, 600 + 60 * size / GIB + longer)
        return cls(int(gib * GIB) if math.isfinite(gib) else None, seconds)


def _files(path: Path) -> list[Path]:
    """A GGUF with its other shards, as far as they are there."""
    stem, mark, _ = path.name.partition("-00001-of-")
    return [path, *(other for other in path.parent.glob("*.gguf") if mark and other != path and other.name.startswith(stem))]


def _number(variable: str, default: float) -> float:
    """A limit from the environment; infinite for 0."""
    text = os.environ.get(variable, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise LlamaRuntimeError(f"{variable} is {text!r}; give a number, 0 for no limit")
    return value or math.inf
