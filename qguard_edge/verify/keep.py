"""Finished pieces of work on disk, so that a verification that was killed goes on where it stopped.

A piece holds one model's answers to some 96 prompts, or how two models differ on one text. Its file name carries a key: the
hash of everything that decides its content (the model's SHA-256, token ids, settings, library versions). A piece with
another key is never used, so a folder can be shared by runs: the base's answers are made once, however many
candidates are compared with it. Pieces appear whole or not at all; what cannot be read is made again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from convert.outputs import sweep
from convert.reading import read_file
from convert.scratch import shared_path
from qguard_edge.runtimes.batching import Answer
from qguard_edge.verify.drift import DocumentDrift
from quant_grids.errors import FormatError, QGuardError

MOST_TOKENS = 1 << 22  # of a vocabulary
LARGEST_PIECE = 1 << 28  # bytes
LOWEST_KL = -1e-3  # rounding
BYTES_A_TOKEN = 17  # two numbers and a flag
LARGEST_HEAD = 4096  # bytes, of the three arrays


class WorkError(QGuardError):
    """The work folder cannot be used."""


def key_of(parts: Mapping[str, Any]) -> str:
    """Key of a piece of work: 24 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _answers(raw: Any, count: int, longest: int) -> list[Answer]:
    """Kept answers, if they can be answers to so many prompts.

    Raises:
        ValueError: they cannot.
    """
    found = []
    for tokens, ended in raw:
        fits = isinstance(tokens, list) and len(tokens) <= longest and isinstance(ended, bool)
        if not fits or not all(type(token) is int and 0 <= token < MOST_TOKENS for token in tokens):
            raise ValueError("no answer")
        found.append(Answer(tuple(tokens), ended))
    if len(found) != count:
        raise ValueError(f"{len(found)} answers to {count} prompts")
    return found


def _measured(kl: Any, same: Any, loss: Any, rows: int) -> DocumentDrift:
    """A kept measurement, if it can be that of so many positions.

    Raises:
        ValueError: it cannot.
    """
    if (
        {kl.shape, same.shape, loss.shape} != {(rows,)}
        or same.dtype != np.bool_
        or {kl.dtype, loss.dtype} != {np.dtype("f8")}
    ):
        raise ValueError("other arrays than were kept")
    if not np.isfinite(kl).all() or not np.isfinite(loss).all() or (kl < LOWEST_KL).any():
        raise ValueError("values that no measurement gives")
    return DocumentDrift(kl, same, loss)


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
            sweep(folder)

    def answers(self, key: str, make: Callable[[], list[Answer]], *, count: int, longest: int) -> list[Answer]:
        """The answers kept under a key, or made now and kept.

        Args:
            key: of the piece.
            make: answers the prompts.
            count: of the prompts; a piece with another number of answers is made again.
            longest: tokens of an answer at most.
        """
        path = self._path(f"answers-{key}.json")
        if path is not None and path.is_file():
            try:
                return _answers(json.loads(read_file(path, LARGEST_PIECE)), count, longest)
            except (OSError, ValueError, TypeError, RecursionError, FormatError):
                pass  # half a disk, another program's file: made again
        answers = make()
        if path is not None:
            with shared_path(path) as temporary:
                temporary.write_text(json.dumps([[answer.tokens, answer.ended] for answer in answers]), encoding="ascii")
        return answers

    def drift(self, key: str, tokens: int) -> DocumentDrift | None:
        """The measurement of a text of so many tokens, or None."""
        path = self._path(f"drift-{key}.npz")
        if path is None or not path.is_file():
            return None
        try:
            data = BytesIO(read_file(path, LARGEST_PIECE))
            with np.load(data, allow_pickle=False) as kept:
                if sum(member.file_size for member in kept.zip.infolist()) > BYTES_A_TOKEN * tokens + LARGEST_HEAD:
                    return None  # small as a file, and not when it is unpacked
                return _measured(kept["kl"], kept["same"], kept["loss"], tokens - 1)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, FormatError, MemoryError, NotImplementedError):
            return None

    def put_drift(self, key: str, found: DocumentDrift) -> None:
        """Keep a text's measurement."""
        path = self._path(f"drift-{key}.npz")
        if path is not None:
            with shared_path(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, kl=found.kl, same=found.same, loss=found.loss)

    def _path(self, name: str) -> Path | None:
        return self.folder / name if self.folder is not None else None
