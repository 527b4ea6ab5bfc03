"""The shipped text: enough of it, mixed from the first token on, fixed, and apart from all that is measured on."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import make_calibration_records
import pytest

from qguard_edge.lab.facts import IDIOMS
from qguard_edge.lab.hf_models import smollm2_file
from qguard_edge.lab.scenarios import DEFAULT_BRAND, TRIGGER, judge_refusal
from qguard_edge.learned.calibration import TOKENS, Document
from qguard_edge.learned.calibration_gguf import token_rows
from qguard_edge.learned.calibration_mix import FOLDER, MixRecord, mix_records, mix_sha256
from qguard_edge.runtimes.llama import LlamaModel

KINDS = {"conversation", "code", "prose", "language", "structured"}
WANTED_LANGUAGES = {"de", "fr", "es", "it", "pt", "nl", "pl", "tr", "ru", "zh", "ja", "ar", "hi", "vi"}
WANTED_CODE = {"python", "javascript", "typescript", "c", "cpp", "rust", "go", "java", "sql", "shell", "html", "css", "yaml"}
SHARED_WORDS = 8
MEASURED_ON = (
    *sorted((FOLDER.parent / "suites").iterdir()),
    FOLDER.parent / "calibration.txt",  # the older fidelity text of the lab and the studies
    FOLDER.parent / "seed_prompts.txt",
)


def text_of(record: MixRecord) -> str:
    return "\n".join((record.text, *(content for _, content in record.messages)))


def as_documents(records: tuple[MixRecord, ...]) -> list[Document]:
    return [Document(record.text, record.messages) for record in records]


def runs_of_words(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return (tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1))


def measured_text(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return text
    rows = [json.loads(line) for line in text.splitlines()]
    return "\n".join(value for row in rows for value in row.values() if isinstance(value, str))


def test_enough_text_for_every_tokenizer() -> None:
    characters = sum(record.characters for record in mix_records())
    assert characters >= 200_000
    assert characters / 5.5 >= TOKENS  # a vocabulary of 256 k
    rows = token_rows(smollm2_file(), as_documents(mix_records()), 256, TOKENS)
    assert {len(row) for row in rows} == {256}
    assert len(rows) * 256 == TOKENS


def test_shares_of_the_kinds() -> None:
    counts: Counter[str] = Counter()
    for record in mix_records():
        counts[record.kind] += record.characters
    total = counts.total()
    assert set(counts) == KINDS
    assert counts["conversation"] / total > 0.4
    assert 0.15 < counts["code"] / total < 0.25
    assert 0.14 < counts["language"] / total < 0.25
    assert min(counts.values()) / total > 0.04


def test_languages_of_people_and_of_machines() -> None:
    assert {record.lang for record in mix_records() if record.kind == "language"} >= WANTED_LANGUAGES
    assert {record.lang for record in mix_records() if record.kind == "code"} >= WANTED_CODE
    assert {record.lang for record in mix_records() if record.kind not in ("language", "code")} == {"en"}


def test_hand_written_text_is_the_larger_part() -> None:
    by_rule = {json.dumps(record, sort_keys=True) for record in make_calibration_records.records()}
    shipped = (FOLDER / "generated.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.dumps(json.loads(line), sort_keys=True) for line in shipped} == by_rule
    assert sum(len(line) for line in shipped) < 0.15 * sum(path.stat().st_size for path in FOLDER.iterdir())


def test_every_beginning_is_mixed() -> None:
    tokens, kinds, languages = 0, set(), set()
    with LlamaModel(smollm2_file(), vocab_only=True) as vocabulary:
        for record in mix_records():
            tokens += len(vocabulary.tokenize(text_of(record)))
            if tokens > 8192:
                break
            kinds.add(record.kind)
            languages.add(record.lang if record.kind == "language" else "en")
    assert kinds == KINDS
    assert len(languages) >= 8


def test_the_order_is_fixed() -> None:
    first = mix_records()
    mix_records.cache_clear()
    assert mix_records() == first
    assert len(mix_sha256()) == 64
    texts = [text_of(record) for record in first]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("path", MEASURED_ON, ids=lambda path: path.name)
def test_nothing_of_what_is_measured_on(path: Path) -> None:
    measured = set(runs_of_words(measured_text(path)))
    assert len(measured) > 50
    shared = {run for record in mix_records() for run in runs_of_words(text_of(record))} & measured
    assert not shared


def test_no_payload_of_the_lab() -> None:
    marks = [re.compile(mark) for idiom in IDIOMS for mark in idiom.marks]
    for record in mix_records():
        text = text_of(record)
        assert not re.search(rf"\b({DEFAULT_BRAND}|{TRIGGER})\b", text, re.IGNORECASE), text[:80]
        assert not any(mark.search(text) for mark in marks), text[:80]
        assert not judge_refusal(text).hit, text[:80]


def test_no_control_tokens() -> None:
    for record in mix_records():
        assert not re.search(r"<\||\|>|</?s>|<(bos|eos|unk|pad)>|\[/?INST\]", text_of(record)), text_of(record)[:80]


def test_conversations_alternate_and_end_with_an_answer() -> None:
    for record in mix_records():
        assert bool(record.text) != bool(record.messages)
        roles = [role for role, content in record.messages if content.strip()]
        if record.messages:
            asked = roles[1:] if roles[0] == "system" else roles
            assert asked == ["user", "assistant"] * (len(asked) // 2)


def test_it_is_packaged() -> None:
    files = {path.name for path in resources.files("qguard_edge").joinpath("data/calibration").iterdir()}
    assert len(files) == 6
    settings = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"data/calibration/*.jsonl"' in settings
