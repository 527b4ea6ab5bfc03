"""Generated prompts: the same for a seed, distinct, varied, and no fixed list."""

import ast
import re
from collections import Counter

import pytest

from qguard_edge.verify.suites.base import SuitePrompt
from qguard_edge.verify.suites.files import BUILT_IN, built_in
from qguard_edge.verify.suites.generator import built_in_plan, content_words, generate, read_plan
from qguard_edge.verify.suites.matchers import plain

MANY = 2500
PLAN = {
    "slots": {"animal": ["an otter", "a mole", "a bat"], "job": {"fields": ["f", "do"], "rows": ["dig | dig a hole"]}},
    "groups": [
        {"tasks": {"race": ["Who is faster, {animal} or {animal2}?"], "food": ["What does {animal} eat?"]}},
        {"tags": ["x"], "completions": {"code": ["def {job.f}():  # {job.do^}"]}},
    ],
}


def asked(name: str, count: int, seed: int = 0) -> tuple[SuitePrompt, ...]:
    source = built_in(name, seed).source
    assert source is not None
    return source.prompts(0, count)


@pytest.mark.parametrize("name", BUILT_IN)
def test_thousands_of_distinct_prompts(name: str) -> None:
    prompts = asked(name, MANY)
    assert len(prompts) == MANY
    assert len({prompt.id for prompt in prompts}) == MANY
    assert len({plain(prompt.text) for prompt in prompts}) == MANY
    fixed = built_in(name).prompts
    assert prompts[: len(fixed)] == fixed
    assert not any(re.search(r"\{[a-z]", prompt.text) for prompt in prompts)  # no slot left empty


@pytest.mark.parametrize("name", BUILT_IN)
def test_they_are_varied(name: str) -> None:
    more = asked(name, MANY)[len(built_in(name).prompts) :]
    tasks = Counter(prompt.tags[-1] for prompt in more)
    assert max(tasks.values()) <= 0.02 * MANY
    assert len(tasks) >= 60
    openings = Counter(" ".join(prompt.text.split()[:3]) for prompt in more if not prompt.completion)
    assert max(openings.values()) <= 0.1 * MANY
    lengths = sorted(len(prompt.text.split()) for prompt in more)
    assert lengths[len(lengths) * 19 // 20] >= 2 * lengths[len(lengths) // 20]  # 95th and 5th percentile


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_longer_request_begins_with_the_shorter(name: str) -> None:
    source = built_in(name).source
    assert source is not None
    assert source.prompts(0, 200) == source.prompts(0, 100) + source.prompts(100, 200)
    total = len(source.prompts(0, 10**9))
    assert MANY <= total < 10**5
    assert source.prompts(total, total + 5) == ()


@pytest.mark.parametrize("name", BUILT_IN)
def test_another_seed_asks_otherwise(name: str) -> None:
    fixed = len(built_in(name).prompts)
    first, second = (asked(name, 1000, seed) for seed in (0, 1))
    assert first == asked(name, 1000, 0)
    assert first[:fixed] == second[:fixed]
    shared = {prompt.text for prompt in first[fixed:]} & {prompt.text for prompt in second[fixed:]}
    assert len(shared) < 0.35 * (1000 - fixed)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_template_can_be_filled(name: str) -> None:
    plan = built_in_plan(name)
    assert len({task.id for task in plan.tasks}) == len(plan.tasks)
    for task in plan.tasks:
        for wording in task.wordings:
            assert f"{{{task.topic}" in wording, f"{task.id}: every wording must be about {task.topic}"


def test_generated_files_can_be_gone_on_with() -> None:
    for prompt in asked("code", 10**9):
        if prompt.completion:
            indented = ("    pass\n", "        pass\n", "pass\n")
            assert any(parses(prompt.text + more) for more in indented), prompt.text


def parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def test_what_a_plan_gives() -> None:
    plan = read_plan(PLAN)
    prompts = list(generate(plan, 0))
    assert {prompt.text for prompt in prompts if prompt.tags == ("food",)} == {
        "What does an otter eat?",
        "What does a mole eat?",
        "What does a bat eat?",
    }
    for prompt in (prompt for prompt in prompts if prompt.tags == ("race",)):
        first, second = prompt.text.removeprefix("Who is faster, ").removesuffix("?").split(" or ")
        assert first != second
    code = prompts[[prompt.completion for prompt in prompts].index(True)]
    assert (code.text, code.tags) == ("def dig():  # Dig a hole", ("x", "code"))
    # Every task comes once before one comes twice.
    assert len({prompt.tags[-1] for prompt in prompts[:3]}) == 3


def test_what_repeats_a_fixed_prompt_is_left_out() -> None:
    fixed = [SuitePrompt("1", "what does AN OTTER eat")]
    assert content_words(fixed[0].text) == content_words("What does an otter eat?")
    texts = [prompt.text for prompt in generate(read_plan(PLAN), 0, fixed)]
    assert "What does an otter eat?" not in texts
    assert "What does a mole eat?" in texts


def test_a_template_without_its_slot_is_refused() -> None:
    with pytest.raises(KeyError, match="no slot"):
        read_plan({"groups": [{"tasks": {"a": ["Nothing to fill in."]}}]})
