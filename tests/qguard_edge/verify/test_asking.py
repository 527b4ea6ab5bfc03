"""Prompts of similar length are answered together, in a context of their own size; the answers are those of each group alone."""

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qguard_edge.packs.record import ask_settings
from qguard_edge.runtimes.llama import LlamaModel
from qguard_edge.verify.asking import Asker, SuiteQuestions, contexts_of, group_of
from qguard_edge.verify.keep import WorkFolder
from qguard_edge.verify.runner import most_tokens, sequences
from qguard_edge.verify.suites.base import Suite, SuitePrompt
from tests.helpers.gguf_copies import copy_gguf

NEW = 4
LENGTHS = (20, 600, 30, 1100, 25, 700, 40)


def suite_of(name: str, lengths: tuple[int, ...]) -> SuiteQuestions:
    rng = random.Random(name)
    ids = tuple(tuple(rng.randrange(2, 380) for _ in range(length)) for length in lengths)
    prompts = tuple(SuitePrompt(f"{i}", "x") for i in range(len(lengths)))
    return SuiteQuestions(Suite(name, name, prompts, (), new_tokens=NEW), ids)


MIXED = suite_of("mixed", LENGTHS)
SHORT = suite_of("short", (30, 36, 40))


@pytest.fixture(scope="module")
def model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asked") / "asked.gguf"
    copy_gguf(tiny_base, path, fields={"llama.context_length": 4096})
    return path


@pytest.fixture
def asker(model: Path) -> Iterator[Asker]:
    with closing(Asker(model, "x", "base", ask_settings(1, 0, 4), WorkFolder(None))) as made:
        yield made


def test_groups() -> None:
    assert [group_of(n) for n in (1, 512, 513, 1024, 1025, 8000)] == [512, 512, 1024, 1024, 2048, 8192]
    assert contexts_of([SHORT]) == {512: 64}
    assert contexts_of([SHORT, MIXED]) == {512: 64, 1024: 704, 2048: 1152}
    for n_ctx in (64, 1024, 1088, 4096, 16384):
        assert sequences(n_ctx, 32) * n_ctx <= most_tokens(32)


def test_answers_come_in_the_order_of_the_prompts_and_are_those_of_each_group_alone(asker: Asker, model: Path) -> None:
    contexts, told = contexts_of([SHORT, MIXED]), list[int]()
    found = asker.ask(MIXED, 0, len(LENGTHS), contexts, told.append)
    assert sorted(told) == [1, 2, 4]
    for group, n_ctx in contexts.items():
        places = [i for i, ids in enumerate(MIXED.ids) if group_of(len(ids) + NEW) == group]
        with LlamaModel(model, n_ctx=n_ctx, n_seq=sequences(n_ctx, 4), n_threads=1, n_batch=512) as alone:
            expected = alone.generate([MIXED.ids[i] for i in places], NEW)
        assert [found[i] for i in places] == expected


def test_long_prompts_of_another_suite_change_no_answer_to_short_ones(asker: Asker) -> None:
    before = asker.ask(SHORT, 0, 3, contexts_of([SHORT]))
    asker.ask(MIXED, 0, len(LENGTHS), contexts_of([SHORT, MIXED]))
    assert asker.ask(SHORT, 0, 3, contexts_of([SHORT, MIXED])) == before


def test_rounds_give_what_one_round_gives(model: Path, tmp_path: Path) -> None:
    """Of a group with a single prompt per round: the kept answers of one round are not those of the next."""
    contexts = contexts_of([MIXED])
    with closing(Asker(model, "x", "base", ask_settings(1, 0, 1), WorkFolder(tmp_path))) as asker:
        whole = asker.ask(MIXED, 0, len(LENGTHS), contexts)
        parts = [asker.ask(MIXED, start, min(start + 2, len(LENGTHS)), contexts) for start in range(0, len(LENGTHS), 2)]
        assert tuple(answer for part in parts for answer in part) == whole
    with closing(Asker(model, "x", "base", ask_settings(1, 0, 1), WorkFolder(tmp_path))) as again:
        assert again.ask(MIXED, 0, len(LENGTHS), contexts) == whole
        assert again.speed is None  # nothing was generated: all answers were kept


def test_more_than_the_process_was_started_for_opens_the_file_anew(asker: Asker) -> None:
    long = suite_of("long", (60,))
    asker.ask(long, 0, 1, {512: 64})
    first = asker._model
    asker.ask(long, 0, 1, {512: 128})
    assert asker._model is first
    asker.ask(long, 0, 1, {512: 2 * most_tokens(4)})
    assert asker._model is not first
