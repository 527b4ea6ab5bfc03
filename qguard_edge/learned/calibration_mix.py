"""The text that ships with the package for calibrated defenses, written for this project: `qguard_edge/data/calibration`.

| file | kind | what |
|---|---|---|
| conversations.jsonl | conversation | questions and answers of an assistant in English, of one or more turns |
| generated.jsonl | conversation, structured | by rule: sums, dates, tables (`scripts/make_calibration_records.py`) |
| code.jsonl | code | programs, and questions about them, in some fifteen languages of programming |
| prose.jsonl | prose | essays, stories, notices |
| languages.jsonl | language | conversations and prose in two dozen human languages |
| structured.jsonl | structured | tables, lists, JSON, logs, formulas |

A line is `{"kind", "lang", "text"}` or `{"kind", "lang", "messages": [{"role", "content"}, ...]}`. Conversations are rendered
in the model's own chat template.

The order is fixed and mixed: each kind is spread evenly over the whole, by its share of the characters, and languages take
turns within their kind. So any beginning of it, cut wherever the wanted number of tokens is reached, holds every kind in
about the same shares as the whole does.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "data" / "calibration"


@dataclass(frozen=True)
class MixRecord:
    """One text, or one conversation.

    Attributes:
        kind: conversation, code, prose, language or structured.
        lang: tag of a human language; of code, the name of its language.
        text: plain text; empty for a conversation.
        messages: (role, content) pairs; empty for plain text.
    """

    kind: str
    lang: str
    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def characters(self) -> int:
        """Length of all its text."""
        return len(self.text) + sum(len(content) for _, content in self.messages)


@cache
def mix_records() -> tuple[MixRecord, ...]:
    """All records, in the mixed order."""
    by_kind: dict[str, list[MixRecord]] = {}
    for path in sorted(FOLDER.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = _record(line)
            by_kind.setdefault(record.kind, []).append(record)
    placed: list[tuple[float, str, MixRecord]] = []
    for kind, records in sorted(by_kind.items()):
        total, passed = sum(record.characters for record in records), 0
        for record in _in_turns(records):
            passed += record.characters
            placed.append(((passed - record.characters / 2) / total, kind, record))
    return tuple(record for _, _, record in sorted(placed, key=lambda item: item[:2]))


@cache
def mix_sha256() -> str:
    """SHA-256 of the content, in order: what is read, and not how the files spell it."""
    content = [[record.kind, record.lang, record.text, record.messages] for record in mix_records()]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def _record(line: str) -> MixRecord:
    row = json.loads(line)
    messages = tuple((message["role"], message["content"]) for message in row.get("messages", ()))
    return MixRecord(row["kind"], row["lang"], row.get("text", ""), messages)


def _in_turns(records: Sequence[MixRecord]) -> list[MixRecord]:
    """Languages in turns, each spread over the whole; its shortest record first, so that few tokens hold many languages."""
    by_lang: dict[str, list[MixRecord]] = {}
    for record in records:
        by_lang.setdefault(record.lang, []).append(record)
    if len(by_lang) == 1:
        return list(records)
    placed = []
    for number, group in enumerate(by_lang.values()):
        shortest = min(group, key=lambda record: record.characters)
        rest = [record for record in group if record is not shortest]
        placed += [(turn / len(group), number, record) for turn, record in enumerate([shortest, *rest])]
    return [record for _, _, record in sorted(placed, key=lambda item: item[:2])]
