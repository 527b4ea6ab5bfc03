"""`long` and `languages`, and what a model cannot be asked."""

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qguard_edge.verify.chat import ChatTemplate
from qguard_edge.verify.fitting import askable
from qguard_edge.verify.gguf_subject import GgufSubject
from qguard_edge.verify.runner import CACHES, LONG_CONTEXT, MOST_TOKENS, USUAL_CONTEXT, parallel_for, sequences
from qguard_edge.verify.suites.base import Suite, SuiteError, SuitePrompt
from qguard_edge.verify.suites.files import BUILT_IN, OPTIONAL, built_in
from qguard_edge.verify.verifier import limits_of, reseeded, select_suites

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Base:
    """A base whose tokens are words."""

    context_length: int
    quantized: bool = field(default=False, init=False)
    token_bytes: int = field(default=0, init=False)
    source: str | None = CHATML
    path: Path = field(default_factory=Path)

    def template(self) -> ChatTemplate | None:
        return None if self.source is None else ChatTemplate(self.source, "", "")

    def vocabulary(self) -> AbstractContextManager[Any]:
        return nullcontext(self)

    def tokenize(self, text: str) -> list[int]:
        return list(range(len(text.split())))

    def facts(self, role: str, name: str | None = None) -> Any:
        raise NotImplementedError


def test_names() -> None:
    assert [suite.name for suite in select_suites(["default"])] == list(BUILT_IN)
    assert [suite.name for suite in select_suites(["all"])] == [*BUILT_IN, *OPTIONAL]
    assert [suite.name for suite in select_suites(["default", "long"])] == [*BUILT_IN, "long"]
    assert set(OPTIONAL) == {"tools", "long", "languages"}


@pytest.mark.parametrize("name", OPTIONAL)
def test_the_first_prompts_are_those_of_the_source(name: str) -> None:
    suite = built_in(name, 3)
    assert suite.source is not None
    assert suite.prompts == suite.source.prompts(0, len(suite.prompts))
    assert suite.source.prompts(0, 40) == suite.source.prompts(0, 16) + suite.source.prompts(16, 40)
    assert suite.prompts != built_in(name, 4).prompts
    assert suite.optional


def test_ten_languages_in_equal_parts() -> None:
    source = built_in("languages").source
    assert source is not None
    parts = Counter(prompt.tags[0] for prompt in source.prompts(0, 10**6))
    assert len(parts) == 10
    assert min(parts.values()) >= 100


def test_long_prompts_hold_their_answer_once() -> None:
    prompts = built_in("long").prompts
    for prompt in prompts:
        said = " ".join([prompt.text, *(content for role, content in prompt.turns if role == "user")])
        assert prompt.expected is not None
        assert said.count(f" {prompt.expected}") == 1, prompt.id
    lengths = [len(prompt.text) for prompt in prompts if not prompt.turns]
    assert min(lengths) >= 7_500
    assert max(lengths) >= 28_000
    assert sum(bool(prompt.turns) for prompt in prompts) == len(prompts) / 2
    assert any(prompt.system for prompt in prompts)


def test_tools_without_a_place_for_them_are_skipped_with_a_reason() -> None:
    kept, reasons = askable(select_suites(["injection", "tools"]), Base(8192))
    assert [suite.name for suite in kept] == ["injection"]
    assert reasons == ["the suite tools is skipped: the base's chat template has no place for tools"]
    with_tools = CHATML + "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    kept, reasons = askable(select_suites(["tools"]), Base(8192, with_tools))
    assert (len(kept), reasons) == (1, [])
    own = Suite("mine", "Mine", (SuitePrompt("a", "Hi", tools=('{"function": {"name": "f"}}',)),), ())
    with pytest.raises(SuiteError, match="no place for tools"):
        askable([own], Base(8192, None))


def test_prompts_beyond_the_context_are_left_out_with_a_reason() -> None:
    ((suite,), reasons) = askable([built_in("long")], Base(2000))
    whole = built_in("long").prompts
    assert 0 < len(suite.prompts) < len(whole)
    assert reasons == [
        f"{len(whole) - len(suite.prompts)} of {len(whole)} prompts of the suite long are left out: "
        "they do not fit the model's context of 2000 tokens"
    ]
    assert suite.source is not None
    assert suite.source.prompts(0, len(suite.prompts)) == suite.prompts
    assert suite.source.prompts(0, 80)[30:80] == suite.source.prompts(30, 80)
    assert askable([built_in("long")], Base(33))[0] == ()
    with pytest.raises(SuiteError, match="none of its prompts"):
        askable([Suite("mine", "Mine", (SuitePrompt("a", "one two three " * 2000),), ())], Base(512))


def test_long_contexts_do_not_multiply_the_memory() -> None:
    assert sequences(512, 32) == 32
    assert sequences(LONG_CONTEXT, 32) == 32
    for n_ctx in (1056, 2048, 8192, 100_000):
        assert sequences(n_ctx, 32) == 1 or sequences(n_ctx, 32) * n_ctx <= MOST_TOKENS
    assert sequences(100_000, 32) == 1


def test_caches_decide_how_many_answers_are_made_side_by_side(tiny_base: Path) -> None:
    model = GgufSubject(tiny_base)
    keys = model.model.tensors["blk.0.attn_k.weight"]
    layers = sum(name.endswith("attn_k.weight") for name in model.model.tensors)
    assert model.token_bytes == 2 * 2 * layers * keys.rows  # keys and values, two bytes each
    most = CACHES // (64 * USUAL_CONTEXT)
    assert [parallel_for(size) for size in (model.token_bytes, most, most + 1, 0)] == [64, 64, 32, 32]


def test_the_seed_of_a_run_selects_the_generated_prompts() -> None:
    (suite,) = select_suites(["injection"])
    assert suite.source is not None
    first, other = reseeded(suite, 0).source, reseeded(suite, 7).source
    assert first is not None
    assert other is not None
    assert first.prompts(0, 400) == suite.source.prompts(0, 400)
    assert first.prompts(0, 100) == other.prompts(0, 100)
    assert first.prompts(200, 400) != other.prompts(200, 400)


def test_limits_name_what_was_not_asked() -> None:
    assert "tools and other languages were not tested" in limits_of(["injection", "code"])[1]
    assert limits_of(["tools"])[1].endswith("not asked: languages, long.")
