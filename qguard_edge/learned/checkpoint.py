"""The state of an unfinished run on disk: safetensors with one JSON header, replaced in one step.

A checkpoint belongs to one conversion: its fingerprint covers the plain file, the text, the options and the seed. Any
other is left alone and the run starts anew.
"""

import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from convert.scratch import shared_path

FORMAT = "qguard-checkpoint-1"


@dataclass(frozen=True)
class LearnedState:
    """A state that can be gone on from.

    Attributes:
        fingerprint: of the conversion.
        seed: of its random numbers.
        step: steps done.
        losses: of each step done.
        tensors: the variables.
    """

    fingerprint: str
    seed: int
    step: int
    losses: tuple[tuple[float, float], ...]
    tensors: Mapping[str, Tensor]


def fingerprint_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of everything that decides the result."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def save_checkpoint(path: Path, state: LearnedState) -> None:
    """Write a checkpoint; the old one stays until the new one is complete."""
    header = {
        "format": FORMAT,
        "fingerprint": state.fingerprint,
        "seed": str(state.seed),
        "step": str(state.step),
        "losses": json.dumps(state.losses),
    }
    with shared_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}, temporary, header)


def read_header(path: Path) -> Mapping[str, str] | None:
    """The header of a checkpoint, or None if the file is none."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return header if header.get("format") == FORMAT and header.get("seed", "").isdigit() else None


def checkpoint_seed(path: Path | None) -> int | None:
    """The seed that a checkpoint was made with, so that an unseeded run can go on with it."""
    header = read_header(path) if path and path.is_file() else None
    return int(header["seed"]) if header else None


def load_checkpoint(path: Path | None, fingerprint: str) -> LearnedState | None:
    """The checkpoint of this very conversion, or None."""
    header = read_header(path) if path and path.is_file() else None
    if path is None or header is None or header.get("fingerprint") != fingerprint:
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        losses = tuple((float(a), float(b)) for a, b in json.loads(header["losses"]))
        return LearnedState(fingerprint, int(header["seed"]), int(header["step"]), losses, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


@dataclass
class StopRequest:
    """Whether the user asked to stop."""

    wanted: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C into a request, so that a step is not cut in half; the second one interrupts at once.

    Outside the main thread Python delivers no signals, and nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.getsignal(signal.SIGINT)

    def note(_number: int, _frame: object) -> None:
        request.wanted = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)
