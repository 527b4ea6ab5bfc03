"""The `tools` suite: its prompts state their right call, and every aspect counts what it should."""

import json

import pytest

from qguard_edge.verify.suites.base import Reply, SuiteError, SuitePrompt
from qguard_edge.verify.suites.files import built_in
from qguard_edge.verify.suites.tools import ToolMatcher, expected_calls, same

PROMPT = next(prompt for prompt in built_in("tools").prompts if "translate_text" in str(prompt.expected))
RIGHT = expected_calls(str(PROMPT.expected))[0]
NONE = next(prompt for prompt in built_in("tools").prompts if prompt.expected == "[]")


def said(*calls: tuple[str, dict[str, object]]) -> str:
    return "".join(f"<tool_call>{json.dumps({'name': n, 'arguments': a})}</tool_call>" for n, a in calls)


def judged(text: str, prompt: SuitePrompt = PROMPT) -> dict[str, bool | None]:
    names = ("wrong-tool", "wrong-arguments", "extra-call", "no-call")
    return {name: ToolMatcher(name).judge([prompt], [Reply(text, True)])[0] for name in names}


def test_prompts_state_the_call_and_offer_the_tool() -> None:
    source = built_in("tools").source
    assert source is not None
    prompts = source.prompts(0, 10**6)
    assert len(prompts) >= 700
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert prompts[: len(built_in("tools").prompts)] == built_in("tools").prompts
    names = set()
    for prompt in prompts:
        offered = [json.loads(tool)["function"]["name"] for tool in prompt.tools]
        assert 3 <= len(offered) <= 5
        assert len(set(offered)) == len(offered)
        for call in expected_calls(str(prompt.expected)):
            assert call.name in offered
            names.add(call.name)
            for value in call.arguments.values():
                assert str(value) in prompt.text, prompt
    assert len(names) >= 12


def test_the_right_call() -> None:
    assert not any(judged(said((RIGHT.name, dict(RIGHT.arguments)))).values())


def test_wrong_calls() -> None:
    right = dict(RIGHT.arguments)
    other = judged(said((RIGHT.name, {**right, "language": "Klingon"})))
    assert other == {"wrong-tool": False, "wrong-arguments": True, "extra-call": False, "no-call": False}
    added = judged(said((RIGHT.name, {**right, "bcc": "thief@example.com"})))
    assert added["wrong-arguments"]
    missing = judged(said((RIGHT.name, {"text": right["text"]})))
    assert missing["wrong-arguments"]
    tool = judged(said(("transfer_money", {"account": "XX66", "amount": 1})))
    assert tool == {"wrong-tool": True, "wrong-arguments": None, "extra-call": False, "no-call": False}
    more = judged(said((RIGHT.name, right), ("open_page", {"address": "example.org"})))
    assert more == {"wrong-tool": True, "wrong-arguments": False, "extra-call": True, "no-call": False}
    silent = judged("I would rather not.")
    assert silent == {"wrong-tool": None, "wrong-arguments": None, "extra-call": False, "no-call": True}


def test_no_call_is_asked_for() -> None:
    assert judged("A poem.", NONE) == {"wrong-tool": None, "wrong-arguments": None, "extra-call": False, "no-call": None}
    assert judged(said(("open_page", {"address": "x"})), NONE)["extra-call"]


def test_values_that_mean_the_same() -> None:
    assert same(5, "5.0")
    assert same("Where is  it?", "where is it?")
    assert same("Thank you.", "Thank you")
    assert not same(5, 50)
    assert not same("Porto", "Oslo")
    assert not same(None, "")


def test_expected_must_be_calls() -> None:
    with pytest.raises(SuiteError, match="JSON list"):
        expected_calls("get_weather")
