"""Which text is used, and how it becomes rows: packing, the mix joined by a file, and a GGUF against transformers."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from convert.hf.base import write_base_gguf
from qguard_edge.learned.calibration import (
    SELF,
    TOKENS,
    CalibrationError,
    CalibrationOptions,
    Document,
    chosen_documents,
    load_calibration,
)
from qguard_edge.learned.calibration_gguf import gguf_calibration, token_rows
from qguard_edge.learned.calibration_mix import mix_records
from qguard_edge.learned.calibration_packing import in_turns, pack
from qguard_edge.learned.calibration_rows import REFUSED
from qguard_edge.runtimes.hf import HfModel, load_hf_model
from qguard_edge.runtimes.llama import LlamaModel
from qguard_edge.verify.chat import ChatTemplate, TemplateError, render_conversations

WRITES = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + WRITES
MARKED = (
    "{% for m in messages %}{%- if m['role'] == 'assistant' -%}{%- generation -%}<assistant>{{ m['content'] }}"
    "{% endgeneration %}{% else %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}\n{% endfor %}"
)
REFUSES = "{{ raise_exception('never') }}"
DATED = "{{ strftime_now('%Y-%m-%d') }} " + WRITES


@pytest.fixture
def model(tiny_folder: Path) -> HfModel:
    return load_hf_model(tiny_folder)


def with_template(folder: Path, target: Path, template: str | None) -> tuple[Path, Path]:
    """The folder with a chat template, and its GGUF."""
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(target)
    write_base_gguf(target, target.with_suffix(".gguf"))
    return target, target.with_suffix(".gguf")


def file_of(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_of(path: Path, row: tuple[int, ...]) -> str:
    with LlamaModel(path, vocab_only=True) as vocabulary:
        return vocabulary.detokenize(row)


# Packing --------------------------------------------------------------------------------------------------------------


def test_packing_keeps_every_id_in_order() -> None:
    documents = [list(range(10, 17)), [20], list(range(30, 35))]
    assert list(pack(documents, 4, 100)) == [(10, 11, 12, 13), (14, 15, 16, 20), (30, 31, 32, 33)]
    assert list(pack([*documents, [40, 41]], 4, 100))[3:] == [(34, 40, 41)]  # of two ids or more


def test_rows_begin_with_the_begin_token() -> None:
    documents = [[1, 10, 11, 12, 13, 14], [1, 20, 21], [1, 30]]
    assert list(pack(documents, 4, 100, [1])) == [(1, 10, 11, 12), (1, 13, 14, 1), (1, 20, 21, 1), (1, 30)]


@pytest.mark.parametrize("tokens", [8, 9, 11, 12])
def test_packing_stops_at_the_limit_and_takes_no_more_documents_than_it_needs(tokens: int) -> None:
    asked: list[int] = []

    def documents() -> Iterator[list[int]]:
        for i in range(100):
            asked.append(i)
            yield [i, i, i]

    rows = list(pack(documents(), 4, tokens))
    assert tokens - 1 <= sum(map(len, rows)) <= tokens
    assert len(asked) <= 4
    assert [i for row in rows for i in row] == [i for i in range(4) for _ in range(3)][: sum(map(len, rows))]


# Choice ---------------------------------------------------------------------------------------------------------------


def test_the_mix_is_the_default(model: HfModel) -> None:
    found = load_calibration(CalibrationOptions(seqlen=64), model, "", 0)
    assert found.source == "mix"
    assert {len(row) for row in found.samples} == {64}
    assert 64 * len(found.samples) == TOKENS
    assert load_calibration(CalibrationOptions(seqlen=64), model, "another", 7) == found  # one text for every seed
    assert len(load_calibration(CalibrationOptions(samples=5, seqlen=64), model, "", 0).samples) == 5


def test_a_file_replaces_the_mix_and_another_joins_it(tmp_path: Path) -> None:
    rows = [{"text": f"own text number {i}, " * 40} for i in range(400)]
    path = file_of(tmp_path / "own.jsonl", *rows)
    shipped = {record.text for record in mix_records()}
    alone = chosen_documents(CalibrationOptions(path), 0)
    assert not {document.text for document in alone} & shipped
    joined = chosen_documents(CalibrationOptions(add=path), 0)
    assert joined == chosen_documents(CalibrationOptions(add=path), 0)
    assert joined != chosen_documents(CalibrationOptions(add=path), 1)
    assert len(joined) == len(mix_records()) + 400
    for cut in (40, 100, 200):
        own = sum(document.characters for document in joined[:cut] if document.text.startswith("own text"))
        assert 0.35 < own / sum(document.characters for document in joined[:cut]) < 0.65


def test_turns_go_on_when_one_text_is_used_up() -> None:
    long, short = [Document(f"{i}" * 10) for i in range(5)], [Document("x" * 10)]
    assert in_turns(long, short) == [long[0], short[0], *long[1:]]
    assert in_turns([], long) == long


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    path = file_of(tmp_path / "own.jsonl", {"text": "own"})
    for options in (CalibrationOptions(path, add=path), CalibrationOptions(SELF, add=path)):
        with pytest.raises(CalibrationError, match="--calib-add joins"):
            options.check()
    with pytest.raises(CalibrationError, match=r"--calib-add none\.txt: no such"):
        CalibrationOptions(add=tmp_path / "none.txt").check()
    CalibrationOptions(SELF).check()
    assert CalibrationOptions(add=path).source == "mix + own.jsonl"


# A GGUF alone ---------------------------------------------------------------------------------------------------------


def as_transformers(model: HfModel, messages: Sequence[tuple[str, str]]) -> str:
    turns = [{"role": role, "content": content} for role, content in messages]
    return str(model.tokenizer.apply_chat_template(turns, tokenize=False))


@pytest.mark.parametrize("template", [WRITES, MARKED])
def test_rendering_as_transformers_does(model: HfModel, template: str) -> None:
    conversations = [record.messages for record in mix_records() if record.messages][:40]
    model.tokenizer.chat_template = template
    wanted = [as_transformers(model, messages) for messages in conversations]
    assert render_conversations(ChatTemplate(template, "", ""), conversations) == wanted


@pytest.mark.parametrize("template", [None, WRITES, NO_SYSTEM, DATED, MARKED])
def test_a_gguf_gives_the_rows_of_transformers(tiny_folder: Path, tmp_path: Path, template: str | None) -> None:
    folder, path = with_template(tiny_folder, tmp_path / "model", template)
    options = CalibrationOptions(samples=200, seqlen=128)
    theirs = load_calibration(options, load_hf_model(folder), "", 0)
    ours = gguf_calibration(path, options, 0)
    assert ours.sha256 == theirs.sha256
    assert ours.samples == theirs.samples
    assert ours.warnings == theirs.warnings == ()
    first = text_of(path, ours.samples[0])
    assert ("<user>" in first) == bool(template)
    assert ("2025-01-01" in first) == (template == DATED)


def test_the_real_template_and_tokenizer(smollm2_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "smollm2.gguf"
    write_base_gguf(smollm2_folder, path)
    model = load_hf_model(smollm2_folder)
    conversations = [record.messages for record in mix_records() if record.messages]
    template = ChatTemplate(model.template_key, model.tokenizer.bos_token, model.tokenizer.eos_token)
    assert render_conversations(template, conversations) == [as_transformers(model, messages) for messages in conversations]
    theirs = load_calibration(CalibrationOptions(), model, "", 0)
    ours = gguf_calibration(path, CalibrationOptions(), 0)
    assert sum(map(len, ours.samples)) == TOKENS
    assert ours == theirs
    assert token_rows(path, chosen_documents(CalibrationOptions(), 0), 256, TOKENS) == list(ours.samples)
    with LlamaModel(path, vocab_only=True) as vocabulary:
        assert vocabulary.detokenize(ours.samples[0], special=True).startswith("<|im_start|>")


def test_a_template_that_refuses_leaves_the_mix_plain_with_a_warning(tiny_folder: Path, tmp_path: Path) -> None:
    folder, path = with_template(tiny_folder, tmp_path / "model", REFUSES)
    options = CalibrationOptions(samples=20, seqlen=64)
    for found in (gguf_calibration(path, options, 0), load_calibration(options, load_hf_model(folder), "", 0)):
        assert any(REFUSED in warning for warning in found.warnings)
        assert len(found.samples) == 20
    own = CalibrationOptions(file_of(tmp_path / "own.jsonl", {"instruction": "do", "output": "done"}))
    with pytest.raises(TemplateError):
        gguf_calibration(path, own, 0)
    with pytest.raises(TemplateError):
        load_calibration(own, load_hf_model(folder), "", 0)


def test_a_gguf_cannot_write_its_own_text(tiny_base: Path) -> None:
    with pytest.raises(CalibrationError, match="--calib self"):
        gguf_calibration(tiny_base, CalibrationOptions(SELF), 0)
