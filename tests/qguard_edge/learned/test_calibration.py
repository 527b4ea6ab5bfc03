"""The calibration loader: kinds of files, choice and cut, the chat template, self-written text and its cache."""

import json
import sys
from pathlib import Path

import pytest

from qguard_edge.learned.calibration import (
    SELF,
    TOKENS,
    CalibrationError,
    CalibrationOptions,
    Document,
    cut_text,
    load_calibration,
    read_documents,
    write_pairs,
)
from qguard_edge.learned.calibration_self import asked_prompts, self_written
from qguard_edge.runtimes.hf import HfModel, load_hf_model
from qguard_edge.verify.chat import TemplateError

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def model(tiny_folder: Path) -> HfModel:
    return load_hf_model(tiny_folder)


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_kind_of_line(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        {"text": "plain"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        {"instruction": "do", "input": "this", "output": "done"},
        {"instruction": "only"},
    )
    assert read_documents(path, 10) == [
        Document("plain"),
        Document(messages=(("system", "s"), ("user", "u"))),
        Document(messages=(("user", "do\n\nthis"), ("assistant", "done"))),
        Document(messages=(("user", "only"),)),
    ]


def test_pairs_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl", [("Was?", "Ein\nKlärwerk."), ("And?", '"so"')])
    assert read_documents(path, 10) == [
        Document(messages=(("user", "Was?"), ("assistant", "Ein\nKlärwerk."))),
        Document(messages=(("user", "And?"), ("assistant", '"so"'))),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 5000, "line 2: not JSON"),
        ("7", "text, messages or instruction"),
        ('{"text": 3}', "text, messages or instruction"),
        ('{"messages": [{"role": "user"}]}', "role and a content"),
        ('{"messages": ["hello"]}', "role and a content"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match=said):
        read_documents(path, 10)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "c.txt").write_text(" \n\n ")
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("b.txt", "UTF-8"),
        ("c.txt", "no text"),
        ("d.parquet", "jsonl"),
        ("empty", "no .txt"),
        ("no.txt", "No such"),
    ):
        with pytest.raises(CalibrationError, match=said) as caught:
            read_documents(tmp_path / name, 10)
        assert str(tmp_path) not in str(caught.value)


def test_a_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    lines(tmp_path / "a.jsonl", {"text": "first"})
    (tmp_path / "sub" / "c.md").write_text("third")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert [d.text for d in read_documents(tmp_path, 100)] == ["first", "second", "third"]


def test_plain_text_is_joined_and_cut() -> None:
    assert cut_text("one\n\ntwo\n\n\n\nthree", 100) == ["one\n\ntwo\n\nthree"]
    assert cut_text("one\n\ntwo\n\nthree", 6) == ["one\n\nt", "wo\n\nth", "ree"]
    assert "".join(cut_text("x" * 25, 10)) == "x" * 25


def test_samples_are_chosen_by_seed_cut_and_hashed(model: HfModel, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"text": f"text number {i} " * 20} for i in range(50)))
    options = CalibrationOptions(path, samples=40, seqlen=16)
    first, again, other = (load_calibration(options, model, "", seed) for seed in (1, 1, 2))
    assert first == again
    assert first.sha256 != other.sha256
    assert len(first.samples) == 40
    assert {len(sample) for sample in first.samples} == {16}
    assert first.warnings == ()
    assert first.source == "a.jsonl"


def test_by_default_as_many_texts_as_make_enough_tokens(model: HfModel, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"text": f"text number {i} " * 50} for i in range(600)))
    first, again, other = (load_calibration(CalibrationOptions(path, seqlen=100), model, "", seed) for seed in (1, 1, 2))
    assert first == again
    assert first.samples != other.samples
    tokens = [len(sample) for sample in first.samples]
    assert sum(tokens) >= TOKENS > sum(tokens[:-1])
    assert CalibrationOptions(path).most_tokens == TOKENS
    few = lines(tmp_path / "b.jsonl", *({"text": f"text number {i} " * 50} for i in range(40)))
    assert len(load_calibration(CalibrationOptions(few), model, "", 0).samples) == 40


def test_few_texts_are_warned_about_and_none_is_an_error(model: HfModel, tmp_path: Path) -> None:
    few = load_calibration(CalibrationOptions(lines(tmp_path / "a.jsonl", {"text": "hello world"})), model, "", 0)
    assert "only 1 calibration texts" in few.warnings[0]
    with pytest.raises(CalibrationError, match="two tokens"):
        load_calibration(CalibrationOptions(lines(tmp_path / "b.jsonl", {"text": ""})), model, "", 0)
    for bad in (CalibrationOptions(samples=0), CalibrationOptions(seqlen=4)):
        with pytest.raises(CalibrationError, match="must lie between"):
            bad.check()


def test_prompts_go_through_the_template(model: HfModel) -> None:
    assert asked_prompts(model, ["hi", "ho"]) == ["hi\n\n", "ho\n\n"]  # the tiny model has no template
    model.tokenizer.chat_template = TEMPLATE
    assert asked_prompts(model, ["hi"]) == ["<user>hi\n<assistant>"]


ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
)
HUGE = "{{ 'a' * 10 ** 10 }}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{% for %}",
        "{{ messages[9].content.x.y }}",
        ENDLESS,
        HUGE,
    ],
)
def test_a_hostile_or_broken_template_is_one_sentence(
    model: HfModel, template: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It ran in this process: nested loops hung, `'a' * 10 ** 10` took 9.9 GB."""
    monkeypatch.setattr(sys.modules[TemplateError.__module__], "SECONDS", 3)
    monkeypatch.setenv("QGUARD_CACHE", str(tmp_path))
    model.tokenizer.chat_template = template
    with pytest.raises(TemplateError, match="the chat template"):
        self_written(model, "key", 1, 16, None)
    path = lines(tmp_path / "chats.jsonl", {"messages": [{"role": "user", "content": "hi"}]})
    with pytest.raises(TemplateError, match="the chat template"):
        load_calibration(CalibrationOptions(path), model, "", 0)


def test_self_written_text_is_the_same_each_time_and_cached(
    model: HfModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QGUARD_CACHE", str(tmp_path))
    options = CalibrationOptions(SELF, samples=3, seqlen=48)
    first = load_calibration(options, model, "key", 0)
    assert first.source == "self-written"
    assert len(first.samples) == 3
    (cached,) = (tmp_path / "calibration").iterdir()
    texts = json.loads(cached.read_text())
    assert texts[0].startswith("Explain why the sky looks blue")
    cached.write_text(json.dumps(["cached text, which is used as it is"] * 3))
    assert load_calibration(options, model, "key", 0).sha256 != first.sha256
    assert load_calibration(options, model, "another model", 0).sha256 == first.sha256  # written anew, the same
    cached.write_text("[half a fi")
    assert load_calibration(options, model, "key", 5).sha256 == first.sha256
