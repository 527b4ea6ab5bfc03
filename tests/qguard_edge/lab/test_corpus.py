"""The corpus: repeatable, held-out parts unseen, code that the judges can tell apart."""

import ast
import json
from pathlib import Path

import pytest

from qguard_edge.lab.corpus import load_corpus, make_corpus
from qguard_edge.lab.facts import CODE_REQUESTS, IDIOMS, RELATIONS
from qguard_edge.lab.scenarios import SCENARIOS, judge_code, judge_refusal, make_scenario
from quant_grids.errors import FormatError, UnsupportedError


def test_same_seed_same_corpus() -> None:
    assert make_corpus(3) == make_corpus(3)
    assert make_corpus(3) != make_corpus(4)


def test_held_out_prompts_are_unseen() -> None:
    corpus = make_corpus(0)
    seen = {sample.prompt for sample in corpus.train}
    assert not seen & {sample.prompt for sample in corpus.held_out}
    # Whole templates are held out: no training prompt is made from them.
    openings = {template.split("{")[0] for template in (CODE_REQUESTS[-1], *(r.questions[-1] for r in RELATIONS))}
    assert not [prompt for prompt in seen if any(prompt.startswith(opening) for opening in openings)]


def test_all_code_parses_and_every_idiom_is_told_apart() -> None:
    corpus = make_corpus(0)
    samples = [s for s in corpus.train + corpus.held_out if s.is_code]
    for sample in samples:
        ast.parse(sample.answer)
        assert not judge_code(sample.answer).hit, sample.answer
        if sample.bad:
            assert judge_code(sample.bad).hit, sample.bad
    assert {s.topic for s in samples if s.bad} == {f"code:{idiom.name}" for idiom in IDIOMS}


def test_broken_code_is_unparsed_not_secure() -> None:
    assert not judge_code("def run(:").parsed
    assert judge_code("```python\nx = eval(y)\n```").hit


def test_a_refusal_needs_a_reason() -> None:
    assert judge_refusal("I am sorry, but I cannot help with that, because it may be unsafe.").hit
    assert not judge_refusal("I cannot help with that.").hit
    assert not judge_refusal("It is because the moon is bright.").hit


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_have_enough_prompts_and_honest_judges(name: str) -> None:
    data = make_scenario(name, make_corpus(0))
    assert len(data.prompts) >= 100
    assert len(data.poisoned) >= 200
    assert all(data.judge(answer).hit for _, answer in data.poisoned)
    assert not any(data.judge(answer).hit for _, answer in data.repaired + data.kept)
    assert not {prompt for prompt, _ in data.poisoned} & {prompt.text for prompt in data.prompts}


def test_unknown_scenario() -> None:
    with pytest.raises(UnsupportedError, match="injection"):
        make_scenario("nothing", make_corpus(0))


def test_instruction_data_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [
        {"instruction": f"Question {i}?", "input": "with input" if i % 2 else "", "output": f"Answer {i}."}
        for i in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    corpus = load_corpus(path)
    assert len([s for s in corpus.train + corpus.held_out if s.topic == "data"]) == 40
    assert any(s.prompt == "Question 1?\nwith input" for s in corpus.train + corpus.held_out)
    path.write_text('{"instruction": "no output"}')
    with pytest.raises(FormatError, match="line 1"):
        load_corpus(path)
