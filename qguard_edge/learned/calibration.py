"""The text that calibrated defenses look at: the user's own, or written by the full-precision model itself.

A file is a `.txt` (or `.md`), where paragraphs are joined into texts of about the wanted length, or `.jsonl`, one object a
line with `text`, `messages` (role and content) or `instruction` (with `input`, `output`). A folder is all such files in
it. Conversations go through the model's own chat template, rendered in transformers' sandbox.

Without a file, the full-precision model answers short seed prompts that the project ships (`data/seed_prompts.txt`). In
full precision it is clean, so what it writes is clean too; and it is the text the model will meet most: its own. The texts
are kept in the cache, by the hash of the model.

Rounding learned on text is fitted to it, so the SHA-256 of the text goes into the file's metadata.
"""

import hashlib
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_grids.errors import QGuardError

if TYPE_CHECKING:
    from qguard_edge.progress import Progress
    from qguard_edge.runtimes.hf import HfModel

SEED_PROMPTS = Path(__file__).parents[1] / "data" / "seed_prompts.txt"
FEW_SAMPLES = 32
TOKENS = 32_768  # of a text that the user gives; fewer fit less well, see docs/quantguard.md
WRITTEN = 128  # texts that the model writes itself
LARGEST_FILE = 1 << 28
CHARACTERS_PER_TOKEN = 5
SUFFIXES = (".txt", ".md", ".jsonl")
_WRITTEN_VERSION = 1  # of how self-written text is made: part of the cache's key


class CalibrationError(QGuardError):
    """The calibration text cannot be used."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Which text, and how much of it.

    Attributes:
        file: .txt, .md, .jsonl or a folder of these; None: the model writes the text itself.
        samples: texts to use at most; None: as many as make `TOKENS` tokens, or `WRITTEN` if the model writes them.
        seqlen: tokens of each text at most.
    """

    file: Path | None = None
    samples: int | None = None
    seqlen: int = 256

    @property
    def most_tokens(self) -> int:
        """Tokens of all texts together, at most."""
        return TOKENS if self.samples is None else self.samples * self.seqlen

    def check(self) -> None:
        """Refuse values outside their limits.

        Raises:
            CalibrationError: naming the option.
        """
        if self.file is not None and not self.file.exists():
            raise CalibrationError(f"--calib {self.file.name}: no such file or folder")
        if self.samples is not None and not 1 <= self.samples <= 1_000_000:
            raise CalibrationError(f"--calib-samples {self.samples}: must lie between 1 and 1000000")
        if not 8 <= self.seqlen <= 131_072:
            raise CalibrationError(f"--calib-seqlen {self.seqlen}: must lie between 8 and 131072")


def write_pairs(path: Path, pairs: Iterable[tuple[str, str]]) -> Path:
    """Write (prompt, answer) pairs as `.jsonl` that `--calib` reads; returns the path."""
    lines = (json.dumps({"instruction": prompt, "output": answer}) + "\n" for prompt, answer in pairs)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Document:
    """One text, or one conversation: (role, content) pairs. Exactly one of the two is set."""

    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Calibration:
    """Token ids to learn on.

    Attributes:
        samples: at least two ids each.
        sha256: of the texts, in the order they are used.
        source: file name, or `self-written`.
        warnings: one sentence each.
    """

    samples: tuple[tuple[int, ...], ...]
    sha256: str
    source: str
    warnings: tuple[str, ...]


def load_calibration(
    options: CalibrationOptions, model: "HfModel", model_key: str, seed: int, progress: "Progress | None" = None
) -> Calibration:
    """The calibration samples of a model.

    Args:
        options: which text.
        model: full precision, with its tokenizer.
        model_key: identifies the model for the cache of self-written text.
        seed: of the choice among more texts than are wanted.
        progress: told about text being written.

    Raises:
        CalibrationError: no usable text.
    """
    options.check()
    if options.file is None:
        texts: Iterable[str] = _self_written(options, model, model_key, progress)
        source, rendered = "self-written", True
    else:
        documents = read_documents(options.file, options.seqlen)
        if options.samples is None:
            documents = random.Random(seed).sample(documents, len(documents))
        elif len(documents) > options.samples:
            documents = random.Random(seed).sample(documents, options.samples)
        texts = (model.render(d.messages) if d.messages else d.text for d in documents)
        source, rendered = options.file.name, False
        conversations = [bool(d.messages) for d in documents]
    samples, used, tokens = [], [], 0
    for index, text in enumerate(texts):
        special = not rendered and not conversations[index]
        ids = model.encode(text, special=special)[: options.seqlen]
        if len(ids) >= 2:
            samples.append(tuple(ids))
            used.append(text)
            tokens += len(ids)
        if options.samples is None and tokens >= TOKENS:
            break
    if not samples:
        raise CalibrationError(f"the calibration text {source} holds no text of two tokens or more")
    digest = hashlib.sha256("\0".join(used).encode()).hexdigest()
    warnings = []
    if len(samples) < FEW_SAMPLES:
        warnings.append(
            f"only {len(samples)} calibration texts: the rounding will fit them too closely; {FEW_SAMPLES} or more are wanted"
        )
    return Calibration(tuple(samples), digest, source, tuple(warnings))


def read_documents(path: Path, seqlen: int) -> list[Document]:
    """All texts of a file or folder, in the order of names and lines.

    Args:
        path: .txt, .md, .jsonl or a folder.
        seqlen: plain text is cut into texts of about this many tokens.

    Raises:
        CalibrationError: unreadable, too large, of another kind, or empty.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise CalibrationError(f"--calib {path.name}: the folder holds no {', '.join(SUFFIXES)} file")
    else:
        files = [path]
    documents: list[Document] = []
    for file in files:
        content = _read(file)
        if file.suffix.lower() == ".jsonl":
            documents += [
                _document(line, f"{file.name}, line {i}") for i, line in enumerate(content.splitlines(), 1) if line.strip()
            ]
        else:
            documents += [Document(text) for text in cut_text(content, seqlen * CHARACTERS_PER_TOKEN)]
    if not documents:
        raise CalibrationError(f"--calib {path.name}: there is no text in it")
    return documents


def cut_text(content: str, length: int) -> list[str]:
    """Paragraphs (separated by empty lines) joined until a text has `length` characters; longer ones are cut."""
    texts: list[str] = []
    current = ""
    for paragraph in content.split("\n\n"):
        piece = paragraph.strip("\n")
        if not piece.strip():
            continue
        current = f"{current}\n\n{piece}" if current else piece
        while len(current) >= length:
            texts.append(current[:length])
            current = current[length:].lstrip()
    return [*texts, current] if current.strip() else texts


def _read(path: Path) -> str:
    if path.suffix.lower() not in SUFFIXES:
        raise CalibrationError(f"--calib {path.name}: give a {', '.join(SUFFIXES)} file or a folder of these")
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise CalibrationError(
                f"--calib {path.name} has {size >> 20} MiB; give at most {LARGEST_FILE >> 20} MiB of text"
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CalibrationError(f"--calib {path.name} cannot be read as UTF-8 text: {reason}") from error


def _document(line: str, where: str) -> Document:
    """One line of JSON."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"--calib {where}: not JSON") from error
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return Document(row["text"])
        if isinstance(row.get("messages"), list):
            return Document(messages=tuple(_message(message, where) for message in row["messages"]))
        if isinstance(row.get("instruction"), str):
            asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part and isinstance(part, str))
            answer = row.get("output", row.get("response", ""))
            pairs = [("user", asked)] + ([("assistant", answer)] if isinstance(answer, str) and answer else [])
            return Document(messages=tuple(pairs))
    raise CalibrationError(f"--calib {where}: an object with text, messages or instruction is wanted")


def _message(message: Any, where: str) -> tuple[str, str]:
    if isinstance(message, Mapping) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str):
        return message["role"], message["content"]
    raise CalibrationError(f"--calib {where}: each message needs a role and a content, both text")


def _self_written(
    options: CalibrationOptions, model: "HfModel", model_key: str, progress: "Progress | None"
) -> Sequence[str]:
    """Texts by the model, from the cache or written now. Always from the same seed: one model, one text."""
    prompts = SEED_PROMPTS.read_text(encoding="utf-8").splitlines()
    count = options.samples or WRITTEN
    wanted = [prompts[i % len(prompts)] for i in range(count)]
    settings = [_WRITTEN_VERSION, model_key, count, options.seqlen, wanted, model.template_key]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    path = cache_folder() / f"{key}.json"
    if path.is_file():
        try:
            texts = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
                return texts
        except ValueError:
            pass  # half a file from a machine that went down: write it again
    texts = model.write_texts(wanted, options.seqlen, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)
    return texts


def cache_folder() -> Path:
    """`$QGUARD_CACHE/calibration`, or the platform's cache folder."""
    if "QGUARD_CACHE" in os.environ:
        return Path(os.environ["QGUARD_CACHE"]) / "calibration"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qguard-edge" / "calibration"
