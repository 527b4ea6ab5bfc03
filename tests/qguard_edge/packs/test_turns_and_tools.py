"""Conversations and tools in a pack: judged and asked as `verify` does, and what the base cannot be asked is left out."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from convert.ftypes import parse_file_type
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.cli import run
from qguard_edge.packs.check import CheckRequest, check
from qguard_edge.packs.pack import Pack, pack_from_json, pack_to_json, read_pack
from qguard_edge.packs.record import BaselineRequest, record
from qguard_edge.packs.transport import ServerError
from qguard_edge.verify.asking import questions_of
from qguard_edge.verify.files import PairError
from qguard_edge.verify.gguf_subject import GgufSubject
from qguard_edge.verify.rounds import in_drawn_order
from qguard_edge.verify.suites.base import Suite, SuitePrompt
from qguard_edge.verify.suites.files import built_in
from qguard_edge.verify.suites.matchers import ExactMatcher
from qguard_edge.verify.suites.tools import tool_matchers
from qguard_edge.verify.verifier import built_in_texts
from tests.helpers.gguf_copies import copy_gguf

Serve = Callable[[Path], str]
TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}<assistant> "
)
TOOLS = tuple(
    json.dumps({"type": "function", "function": {"name": name, "parameters": {"properties": {"word": {"type": "string"}}}}})
    for name in ("look_up", "erase")
)
CALL = '[{"name": "look_up", "arguments": {"word": "honey"}}]'
TALK = (("user", "My dog is called Rex."), ("assistant", "A good name."))
CALLS = Suite(
    "calls",
    "Calls",
    (SuitePrompt("a", "Look up honey.", expected=CALL, tools=TOOLS), SuitePrompt("b", "Hi", expected="[]", tools=TOOLS[:1])),
    tool_matchers(),
    new_tokens=12,
)
TALKS = Suite(
    "talks",
    "Talks",
    (
        SuitePrompt("c", "What is its name?", system="Be short.", expected="Rex", turns=TALK),
        SuitePrompt("d", "What?", expected="x", turns=TALK[:1]),
    ),
    (ExactMatcher(contains=True),),
    new_tokens=12,
)


@pytest.fixture(scope="module")
def talker(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template that takes tools."""
    path = tmp_path_factory.mktemp("talker") / "talker.gguf"
    copy_gguf(tiny_base, path, fields={"tokenizer.chat_template": TEMPLATE, "llama.context_length": 1024})
    return path


@pytest.fixture(scope="module")
def recorded(talker: Path) -> Pack:
    made = record(BaselineRequest(talker, (CALLS, TALKS), built_in_texts()[:9], threads=1))
    return pack_from_json(pack_to_json(made))


def test_the_suites_come_back_with_turns_and_tools(recorded: Pack) -> None:
    for packed, suite in zip(recorded.suites, (CALLS, TALKS), strict=True):
        assert packed.suite() == replace(suite, prompts=in_drawn_order(suite.prompts, 0))


@pytest.mark.parametrize("name", ["tools", "long"])
def test_built_in_prompts_come_back_too(recorded: Pack, name: str) -> None:
    one, suite = recorded.suites[0], built_in(name)
    prompts = suite.prompts[:8]
    kept = record_of(recorded, suite, prompts)
    assert kept.suites[0].suite() == replace(one.suite(), prompts=prompts, matchers=suite.matchers)


def record_of(pack: Pack, suite: Suite, prompts: tuple[SuitePrompt, ...]) -> Pack:
    """A pack with some prompts of a suite, through its JSON."""
    document = json.loads(pack_to_json(pack))
    packed, example = document["suites"][0], document["suites"][0]["prompts"][0]
    matcher = {"type": "tools"} if suite.name == "tools" else {"type": "exact", "name": "wrong", "contains": True}
    turned = [
        {
            "id": prompt.id,
            "text": prompt.text,
            "system": prompt.system,
            "expected": prompt.expected,
            "tags": list(prompt.tags),
            "turns": [{"role": role, "content": content} for role, content in prompt.turns],
            "tools": [json.loads(tool) for tool in prompt.tools],
        }
        for prompt in prompts
    ]
    packed |= {"matchers": [matcher], "prompts": [{**example, **fields} for fields in turned]}
    return pack_from_json(json.dumps(document))


def test_prompts_are_the_token_ids_that_verify_asks(recorded: Pack, talker: Path) -> None:
    base = GgufSubject(talker)
    asked = questions_of(base, [packed.suite() for packed in recorded.suites], base.template())
    assert [[p.tokens for p in packed.prompts] for packed in recorded.suites] == [list(one.ids) for one in asked]
    for packed, word in zip(recorded.suites, ("look_up", "Rex"), strict=True):
        assert any(prompt.sent and word in prompt.sent for prompt in packed.prompts)


def test_a_file_is_checked(recorded: Pack, talker: Path, tmp_path: Path) -> None:
    file = tmp_path / "q8.gguf"
    quantize(talker, file, QuantizeOptions(parse_file_type("q8_0"), threads=1))
    found = check(CheckRequest(recorded, candidate=file, threads=1))
    assert {one.id for one in found.checks} >= {"calls/wrong-tool", "calls/no-call", "talks/wrong"}
    assert not any("come out differently" in warning for warning in found.warnings)
    assert {name: found.measured.suites[name] for name in ("calls", "talks")} == {"calls": 2, "talks": 2}


def test_a_server_is_asked_the_whole_conversation(recorded: Pack, talker: Path, serve_native: Serve) -> None:
    """It runs the base, so only with the very same prompts it gives the recorded answers."""
    found = check(CheckRequest(recorded, server=serve_native(talker)))
    shown = [one for suite in ("calls", "talks") for one in found.check(f"{suite}/discovery").evidence]
    assert len(shown) == 4
    assert all(one.similarity == 1.0 for one in shown)


def test_a_server_with_too_small_a_context_is_told_how_much_it_takes(talker: Path, serve_native: Serve) -> None:
    long = Suite("one", "One", (SuitePrompt("a", "honey " * 150, turns=TALK),), (), new_tokens=4)
    made = record(BaselineRequest(talker, (long,), built_in_texts()[:9], threads=1))
    with pytest.raises(ServerError, match=r"must hold its \d{3} tokens and 4 new ones \(llama-server: --ctx-size\)"):
        check(CheckRequest(made, server=serve_native(talker)))


def test_what_the_base_cannot_be_asked_is_left_out(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = tmp_path / "pack.json"
    shared = ["--threads", "1", "--limit", "6"]
    assert run(["baseline", str(tiny_base), "-o", str(pack), "--suites", "tools", *shared]) == 0
    said = " ".join(capsys.readouterr().err.split())
    skipped = "the suite tools is skipped: the base's chat template has no place for tools"
    assert skipped in said
    assert read_pack(pack).suites == ()
    run(["check", str(tiny_base), "--baseline", str(pack), *shared])
    assert f"when the pack was made: {skipped}" in " ".join(capsys.readouterr().err.split())


def test_a_suite_of_ones_own_that_the_base_cannot_be_asked_is_an_error(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "mine.yaml"
    suite.write_text("name: mine\nprompts: [{text: Look., tools: [{name: look}]}]\n")
    made = ["baseline", str(tiny_base), "-o", str(tmp_path / "pack.json"), "--suites", "drift", "--suite", str(suite)]
    assert run(made) == 2
    assert "the suite mine is skipped" in " ".join(capsys.readouterr().err.split())


def test_a_quantized_base_is_refused_unless_allowed(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "q8.gguf"
    quantize(tiny_base, file, QuantizeOptions(parse_file_type("q8_0"), threads=1))
    asked = BaselineRequest(file, texts=built_in_texts()[:9], threads=1)
    with pytest.raises(PairError, match=r"the base q8\.gguf is quantized"):
        record(asked)
    assert "is quantized itself" in record(replace(asked, allow_quantized_base=True)).warnings[0]
