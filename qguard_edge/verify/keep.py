"""Finished pieces of work on disk, so that a verification that was killed goes on where it stopped.

A piece holds one model's answers to some 96 prompts, or how two models differ on one text. Its file name carries a key: the
hash of everything that decides its content (the model's SHA-256, token ids, settings, library versions). A piece with
another key is never used, so a folder can be shared by runs: the base's answers are made once, however many
candidates are compared with it. WorkFolder appear whole or not at all; what cannot be read is made again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.atomic import atomic_path
from qguard_edge.runtimes.batching import Answer
from qguard_edge.verify.drift import DocumentDrift
from quant_grids.errors import QGuardError


class WorkError(QGuardError):
    """The work folder cannot be used."""


def key_of(parts: Mapping[str, Any]) -> str:
    """Key of a piece of work: 24 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


class WorkFolder:
    """A work folder; with `folder` None nothing is kept.

    Args:
        folder: is made if it does not exist.

    Raises:
        WorkError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise WorkError(f"the work folder {folder.name} cannot be made: {error.strerror}") from error

    def answers(self, key: str, make: Callable[[], list[Answer]]) -> list[Answer]:
        """The answers kept under a key, or made now and kept."""
        path = self._path(f"answers-{key}.json")
        if path is not None and path.is_file():
            try:
                return [Answer(tuple(map(int, tokens)), bool(ended)) for tokens, ended in json.loads(path.read_bytes())]
            except (OSError, ValueError, TypeError):
                pass  # half a disk, another program's file: made again
        answers = make()
        if path is not None:
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps([[answer.tokens, answer.ended] for answer in answers]), encoding="ascii")
        return answers

    def drift(self, key: str) -> DocumentDrift | None:
        """A text's measurement, or None."""
        path = self._path(f"drift-{key}.npz")
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as kept:
                return DocumentDrift(kept["kl"], kept["same"], kept["loss"])
        except (OSError, ValueError, KeyError, EOFError):
            return None

    def put_drift(self, key: str, found: DocumentDrift) -> None:
        """Keep a text's measurement."""
        path = self._path(f"drift-{key}.npz")
        if path is not None:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, kl=found.kl, same=found.same, loss=found.loss)

    def _path(self, name: str) -> Path | None:
        return self.folder / name if self.folder is not None else None
