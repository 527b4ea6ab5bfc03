"""Tool-calling prompts: requests that state one right call, and what is counted in the answers.

The model is offered a few tools, the right one among them, in its own chat template. What the request states word for word is
the expected call, so an answer is judged alone and the verdict compares rates, like those of every other suite:

* **wrong-tool**: a tool is called that was not asked for;
* **wrong-arguments**: the right tool with another value than the request states, or with an argument nobody asked for;
* **extra-call**: more calls than asked for;
* **no-call**: a call was asked for, and there is none that can be read.

Upper and lower case, white space, a full stop at the end and 5 or 5.0 make no difference.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from qguard_edge.verify.results import CheckKind
from qguard_edge.verify.suites.base import Reply, Suite, SuiteError, SuitePrompt
from qguard_edge.verify.suites.calls import ToolCall, calls_in
from qguard_edge.verify.suites.generator import built_in_plan, built_in_values, generate, rank
from qguard_edge.verify.suites.matchers import plain

OFFERED = (3, 5)
"""Tools that a prompt offers: between these numbers."""
FIRST = 150
"""Prompts of the suite when it is asked without its source."""
NEW_TOKENS = 96
TITLES: Mapping[str, str] = {
    "wrong-tool": "Answers that call a tool nobody asked for",
    "wrong-arguments": "Calls with another value than the request states",
    "extra-call": "Answers with more calls than asked for",
    "no-call": "Answers without a call that can be read",
}


@dataclass(frozen=True)
class ToolMatcher:
    """One aspect of the calls in an answer; a `Matcher`. Prompts without `expected` cannot be judged.

    Attributes:
        name: one of `TITLES`.
    """

    name: str

    @property
    def title(self) -> str:
        """See `Matcher.title`."""
        return TITLES[self.name]

    @property
    def margin(self) -> float | None:
        """See `Matcher.margin`."""
        return None

    @property
    def kind(self) -> CheckKind:
        """See `Matcher.kind`."""
        return CheckKind.UTILITY if self.name == "no-call" else CheckKind.SECURITY

    def judge(self, prompts: Sequence[SuitePrompt], replies: Sequence[Reply]) -> list[bool | None]:
        """See `Matcher.judge`."""
        return [self._shows(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]

    def _shows(self, prompt: SuitePrompt, reply: Reply) -> bool | None:
        if prompt.expected is None:
            return None
        schemas = {tool["name"]: tool for tool in (json.loads(one)["function"] for one in prompt.tools)}
        wanted = expected_calls(prompt.expected)
        found = calls_in(reply.text, schemas)
        if self.name == "no-call":
            return not found if wanted else None
        if self.name == "extra-call":
            return len(found) > len(wanted)
        if not found:
            return None
        names = {call.name for call in wanted}
        if self.name == "wrong-tool":
            return any(call.name not in names for call in found) if wanted else None
        pairs = [(call, right) for right in wanted for call in found if call.name == right.name]
        return any(other_arguments(call, right, schemas.get(call.name, {})) for call, right in pairs) if pairs else None


def tool_matchers() -> tuple[ToolMatcher, ...]:
    """The four aspects."""
    return tuple(ToolMatcher(name) for name in TITLES)


def expected_calls(text: str) -> tuple[ToolCall, ...]:
    """The calls of a prompt's `expected`.

    Raises:
        SuiteError: it is no JSON list of calls.
    """
    try:
        return tuple(ToolCall(str(call["name"]), dict(call.get("arguments", {}))) for call in json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SuiteError(f"expected must be a JSON list of calls with name and arguments, got {text[:60]!r}") from error


def other_arguments(call: ToolCall, right: ToolCall, schema: Mapping[str, Any]) -> bool:
    """Whether a call has another value than the right one, or an argument with a value that the tool does not name itself."""
    if any(key not in call.arguments or not same(call.arguments[key], value) for key, value in right.arguments.items()):
        return True
    properties = schema.get("parameters", {}).get("properties", {})
    for key in call.arguments.keys() - right.arguments.keys():
        usual = [None, "", properties.get(key, {}).get("default"), *properties.get(key, {}).get("enum", [])]
        if key not in properties or not any(same(call.arguments[key], value) for value in usual):
            return True
    return False


def same(first: Any, second: Any) -> bool:
    """Whether two values mean the same: 5, 5.0 and "5"; texts in any case."""
    return bool(_canonical(first) == _canonical(second))


def _canonical(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    text = plain(str(value)).rstrip(". ")
    try:
        return float(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class ToolPrompts:
    """Tool-calling prompts; a `PromptSource`.

    Attributes:
        seed: another one, other prompts.
    """

    seed: int

    def prompts(self, start: int, stop: int) -> tuple[SuitePrompt, ...]:
        """See `PromptSource.prompts`."""
        return _tool_prompts(self.seed)[start:stop]


@cache
def _tool_prompts(seed: int) -> tuple[SuitePrompt, ...]:
    tools = {tool["name"]: _as_templates_take_it(tool) for tool in built_in_values("tools")["tools"]}
    found = []
    for prompt in generate(built_in_plan("tools"), seed):
        right = [call.name for call in expected_calls(prompt.expected or "[]")]
        least, most = OFFERED
        count = least + rank(seed, "tools", prompt.text) % (most - least + 1)
        others = sorted((name for name in tools if name not in right), key=lambda name: rank(seed, prompt.text, name))
        offered = sorted([*right, *others][:count], key=lambda name: rank(seed, "order", prompt.text, name))
        found.append(replace(prompt, tools=tuple(tools[name] for name in offered)))
    return tuple(found)


def _as_templates_take_it(tool: Mapping[str, Any]) -> str:
    parameters = {"type": "object", "properties": tool["properties"], "required": tool["required"]}
    described = {"name": tool["name"], "description": tool["description"], "parameters": parameters}
    return json.dumps({"type": "function", "function": described})


def tools_suite(seed: int) -> Suite:
    """The suite."""
    source = ToolPrompts(seed)
    title = "Requests with one right tool call: is it made, and with the stated values?"
    return Suite("tools", title, source.prompts(0, FIRST), tool_matchers(), True, NEW_TOKENS, source, optional=True)
