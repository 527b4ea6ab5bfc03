"""The state of an unfinished run on disk: safetensors with one JSON header, replaced in one step.

A checkpoint belongs to one conversion: its fingerprint covers the reference file, the text, the options and the seed. Any
other is left alone and the run starts anew.
"""

import hashlib
import json
import secrets
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

from convert.atomic import atomic_path
from qguard_edge.defenses.options import DefenseOptions

FORMAT = "qguard-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
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


def save_checkpoint(path: Path, state: Checkpoint) -> None:
    """Write a checkpoint; the old one stays until the new one is complete."""
    header = {
        "format": FORMAT,
        "fingerprint": state.fingerprint,
        "seed": str(state.seed),
        "step": str(state.step),
        "losses": json.dumps(state.losses),
    }
    with atomic_path(path) as temporary:
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


def checkpoint_path(outfile: Path) -> Path:
    """Where an unfinished learned conversion keeps its state."""
    return outfile.with_name(f".{outfile.name}.checkpoint")


@dataclass(frozen=True)
class Attempt:
    """One attempt at a conversion.

    Attributes:
        seed: of its random numbers.
        checkpoint: where it keeps its state until it is finished; None for a defense that does not resume.
    """

    seed: int
    checkpoint: Path | None

    def finish(self) -> None:
        """Remove the checkpoint once the output has its name; one that is not of this attempt is left alone."""
        if self.checkpoint and checkpoint_seed(self.checkpoint) == self.seed:
            self.checkpoint.unlink()


def begin_attempt(outfile: Path, defense: DefenseOptions, seed: int | None) -> Attempt:
    """Choose the seed, and where the state is kept.

    Args:
        outfile: the final name of the output.
        defense: as it will be used, that is after it was fitted to the memory.
        seed: the user's. None: that of an unfinished attempt to go on with, else a fresh one; for a defense that does not
            resume always a fresh one, so that no file that was left lying about makes it predictable.
    """
    checkpoint = checkpoint_path(outfile) if defense.resumes else None
    found = checkpoint_seed(checkpoint) if seed is None else seed
    return Attempt(secrets.randbits(63) if found is None else found, checkpoint)


def load_checkpoint(path: Path | None, fingerprint: str) -> Checkpoint | None:
    """The checkpoint of this very conversion, or None."""
    header = read_header(path) if path and path.is_file() else None
    if path is None or header is None or header.get("fingerprint") != fingerprint:
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        losses = tuple((float(a), float(b)) for a, b in json.loads(header["losses"]))
        return Checkpoint(fingerprint, int(header["seed"]), int(header["step"]), losses, tensors)
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
