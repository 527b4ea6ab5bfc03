"""The text that calibrated defenses look at: the shipped mix, the user's own, both, or written by the model itself.

Without options it is the mix that the package ships (`qguard_edge.learned.calibration_mix`): every kind of text, the same
for every model. `--calib FILE` replaces it, `--calib-add FILE` joins it: documents of both in turns, so that both have about
the same share of the tokens for as long as there is text of both. What contains the mix is packed: its documents, one
after another, are cut into rows of the wanted length, and nothing is left out. Of a user's own texts, each gives one row at
most, its beginning.

A file is a `.txt` (or `.md`), where paragraphs are joined into texts of about the wanted length, or `.jsonl`, one object a
line with `text`, `messages` (role and content) or `instruction` (with `input`, `output`). A folder is all such files in
it. Conversations go through the model's own chat template, rendered in a sandbox.

With `--calib self`, the full-precision model answers short seed prompts that the project ships (`data/seed_prompts.txt`).
In full precision it is clean, so what it writes is clean too; and it is the text the model will meet most: its own. The
texts are kept in the cache, by the hash of the model.

Rounding learned on text is fitted to it, so the SHA-256 of the text goes into the file's metadata.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.reading import read_text
from qguard_edge.learned.calibration_mix import mix_records
from qguard_edge.learned.calibration_packing import beginnings, in_turns, pack
from qguard_edge.learned.calibration_self import self_written
from quant_grids.errors import QGuardError

if TYPE_CHECKING:
    from qguard_edge.progress import Progress
    from qguard_edge.runtimes.hf import HfModel

SELF = Path("self")
"""`--calib self`: the model writes the text."""
MIX = "mix"
FEW_SAMPLES = 32
TOKENS = (
    24_576  # of a text; twice as many fit no better that one could measure, a quarter fit less well, see docs/feedback.md
)
WRITTEN = 128  # texts that the model writes itself
LARGEST_FILE = 1 << 28
CHARACTERS_PER_TOKEN = 5
SUFFIXES = (".txt", ".md", ".jsonl")


class CalibrationError(QGuardError):
    """The calibration text cannot be used."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Which text, and how much of it.

    Attributes:
        file: .txt, .md, .jsonl or a folder of these; `SELF`: the model writes the text; None: the shipped mix.
        samples: texts (of the mix: rows) to use at most; None: as many as make `TOKENS` tokens, or `WRITTEN` if the model
            writes them.
        seqlen: tokens of each text at most.
        add: text that joins the mix, as `file`; None: nothing.
    """

    file: Path | None = None
    samples: int | None = None
    seqlen: int = 256
    add: Path | None = None

    @property
    def self_written(self) -> bool:
        """Whether the model writes the text."""
        return self.file == SELF

    @property
    def packed(self) -> bool:
        """Whether the text contains the mix, and is cut into full rows."""
        return self.file is None

    @property
    def source(self) -> str:
        """What the text is, in a word: a file's name, `mix`, `mix + FILE` or `self-written`."""
        if self.file is not None:
            return "self-written" if self.self_written else self.file.name
        return f"{MIX} + {self.add.name}" if self.add else MIX

    @property
    def most_tokens(self) -> int:
        """Tokens of all texts together, at most."""
        return TOKENS if self.samples is None else self.samples * self.seqlen

    def check(self) -> None:
        """Refuse values outside their limits.

        Raises:
            CalibrationError: naming the option.
        """
        if self.file is not None and not self.self_written and not self.file.exists():
            raise CalibrationError(f"--calib {self.file.name}: no such file or folder")
        if self.add is not None and self.file is not None:
            raise CalibrationError("--calib-add joins the shipped mix, which --calib replaces: give one of the two")
        if self.add is not None and not self.add.exists():
            raise CalibrationError(f"--calib-add {self.add.name}: no such file or folder")
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

    @property
    def characters(self) -> int:
        """Length of all its text."""
        return len(self.text) + sum(len(content) for _, content in self.messages)

    @property
    def plain(self) -> str:
        """Its text without a chat template: the contents of a conversation, one paragraph each."""
        return "\n\n".join(content for _, content in self.messages) if self.messages else self.text

    @property
    def folded(self) -> "Document":
        """The conversation with its system message in front of the first question, for templates that know no system."""
        if len(self.messages) < 2 or self.messages[0][0] != "system":
            return self
        (_, system), (role, first), *rest = self.messages
        return Document(messages=((role, f"{system}\n\n{first}"), *rest))


@dataclass(frozen=True)
class Calibration:
    """Token ids to learn on.

    Attributes:
        samples: at least two ids each.
        sha256: of the texts, in the order they are used.
        source: see `CalibrationOptions.source`.
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
        TemplateError: the chat template refuses a conversation of the user's own text.
    """
    from qguard_edge.learned.calibration_rows import hf_calibration

    options.check()
    if options.self_written:
        count = options.samples or WRITTEN
        written = self_written(model, model_key, count, options.seqlen, progress)
        return collect(((text, model.encode(text, special=False)) for text in written), options)
    return hf_calibration(model, options, seed)


def chosen_documents(options: CalibrationOptions, seed: int) -> list[Document]:
    """The documents of a mix or of a file, in the order in which they are used; the mix's own order is fixed.

    Args:
        options: which text; not self-written.
        seed: of the order, or the choice, among a file's documents.

    Raises:
        CalibrationError: no usable text.
    """
    given = options.add if options.file is None else options.file
    if given is None:
        return _shipped()
    documents = read_documents(given, options.seqlen)
    count = len(documents)
    if options.samples is None or options.file is None:
        documents = random.Random(seed).sample(documents, count)
    elif count > options.samples:
        documents = random.Random(seed).sample(documents, options.samples)
    return in_turns(_shipped(), documents) if options.file is None else documents


def _shipped() -> list[Document]:
    return [Document(record.text, record.messages) for record in mix_records()]


def collect(
    texts: Iterable[tuple[str, Sequence[int]]], options: CalibrationOptions, start: Sequence[int] = ()
) -> Calibration:
    """Token ids of the texts as samples: packed into rows where the mix is in it, else each text's beginning.

    Args:
        texts: (text, its token ids) in the order of use; taken only as far as they are needed.
        options: which text, and how much of it.
        start: what every row has to begin with: the begin token, or nothing. Only for packed texts.

    Raises:
        CalibrationError: no text of two tokens or more.
    """
    used: list[str] = []

    def noted() -> Iterator[Sequence[int]]:
        for text, ids in texts:
            if len(ids) >= 2:
                used.append(text)
                yield ids

    if options.packed:
        rows = pack(noted(), options.seqlen, options.most_tokens, start)
    else:
        most = TOKENS if options.samples is None and not options.self_written else None
        rows = beginnings(noted(), options.seqlen, most)
    samples = tuple(rows)
    if not samples:
        raise CalibrationError(f"the calibration text {options.source} holds no text of two tokens or more")
    digest = hashlib.sha256("\0".join(used).encode()).hexdigest()
    warnings = []
    if len(samples) < FEW_SAMPLES:
        warnings.append(
            f"only {len(samples)} calibration texts: the rounding will fit them too closely; {FEW_SAMPLES} or more are wanted"
        )
    return Calibration(samples, digest, options.source, tuple(warnings))


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
        return read_text(path, LARGEST_FILE)
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
