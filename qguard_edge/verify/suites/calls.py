r"""Tool calls in an answer, in the forms in which models write them.

Control tokens are gone when an answer is text, so `[TOOL_CALLS]` or `<|python_tag|>` may stand there or not. Read are:

    {"name": "f", "arguments": {"a": 1}}                  bare, in a list, in <tool_call> tags, in a fence, after any mark;
                                                          also "parameters", "args", "tool_name", "function", nested or as text
    f{"a": 1}   f[ARGS]{"a": 1}   to=functions.f ... {}   the name before the object, with marks or a fence between them
    <function=f>{"a": 1}</function>                       the same with the object as parameters:
    <function=f><parameter=a>1</parameter></function>
    f <arg_key>a</arg_key><arg_value>1</arg_value>
    [f(a=1), g(b="x")]   print(f(a=1))                    Python

Forms in which a bare word would be a call count only for names of `known` tools.
"""

import ast
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LONGEST = 20_000
_NAMES = ("name", "tool_name", "function_name", "tool", "function", "action")
_ARGUMENTS = ("arguments", "parameters", "args", "input", "tool_input", "action_input", "kwargs")
_FUNCTION = re.compile(r"<function=([\w.:-]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([\w.-]+)>(.*?)</parameter>", re.DOTALL)
_KEYED = re.compile(r"([\w.-]+)\s*((?:<arg_key>[^<]*</arg_key>\s*<arg_value>.*?</arg_value>\s*)+)", re.DOTALL)
_KEY = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_BETWEEN = re.compile(r"([\w.-]+)(?:\s|\[ARGS\]|<[^<>\s]*>|```(?:json)?|json(?=\W)|:)*\Z")
"""A name, then only marks up to the object with the arguments."""


@dataclass(frozen=True)
class ToolCall:
    """One call.

    Attributes:
        name: of the tool.
        arguments: by name.
    """

    name: str
    arguments: Mapping[str, Any]


def calls_in(text: str, known: Collection[str] = ()) -> tuple[ToolCall, ...]:
    """The calls of an answer in their order; empty when there is none that can be read.

    Args:
        text: of the answer.
        known: names of the tools that were offered.
    """
    text = text[:LONGEST]
    tagged = _tagged(text, known)
    if tagged:
        return tuple(tagged)
    return tuple(_in_objects(text, known)) or tuple(_in_python(text, known))


def _tagged(text: str, known: Collection[str]) -> list[ToolCall]:
    found = []
    for mark in _FUNCTION.finditer(text):
        given = {key: _value(value) for key, value in _PARAMETER.findall(mark[2])}
        body = _mapping(mark[2].strip())
        if given or body is not None or not mark[2].strip():
            found.append(ToolCall(mark[1], given or body or {}))
    keyed = (mark for mark in _KEYED.finditer(text) if mark[1] in known)
    return found + [
        ToolCall(mark[1], {key.strip(): _value(value) for key, value in _KEY.findall(mark[2])}) for mark in keyed
    ]


def _in_objects(text: str, known: Collection[str]) -> Iterator[ToolCall]:
    """Calls in the objects and lists of a text, from left to right."""
    at = done = 0
    while (start := _opening(text, at)) is not None:
        value, end = _read(text, start)
        if value is None:
            at = start + 1
            continue
        found = list(_calls(value))
        before = _BETWEEN.search(text[max(done, start - 200) : start])
        if not found and before and isinstance(value, dict) and _short(before[1]) in known:
            found = [ToolCall(_short(before[1]), value)]
        yield from found
        at = done = end


def _opening(text: str, at: int) -> int | None:
    mark = re.compile(r"[\[{]").search(text, at)
    return mark.start() if mark else None


def _read(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at a place, or a Python dictionary; None where there is none."""
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)
    except (ValueError, RecursionError):
        pass
    if text[start] == "{":
        for end in (mark.end() for mark in re.compile(r"\}").finditer(text, start)):
            value = _literal(text[start:end])
            if isinstance(value, dict):
                return value, end
    return None, start


def _calls(value: Any) -> Iterator[ToolCall]:
    """Calls that a decoded value is, or holds."""
    if isinstance(value, list):
        for part in value:
            yield from _calls(part)
    elif isinstance(value, dict):
        if isinstance(value.get("tool_calls"), list):
            yield from _calls(value["tool_calls"])
            return
        inner = value.get("function")
        if isinstance(inner, dict):
            yield from _calls(inner)
            return
        name = next((value[key] for key in _NAMES if isinstance(value.get(key), str)), None)
        given = next((value[key] for key in _ARGUMENTS if key in value), None)
        if isinstance(given, str):
            given = _mapping(given)
        if name is not None and isinstance(given, dict):
            yield ToolCall(_short(name), given)


def _in_python(text: str, known: Collection[str]) -> Iterator[ToolCall]:
    """Calls `f(a=1)` of known tools."""
    at = 0
    names = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    pattern = re.compile(rf"(?<![\w.])(?:[\w]+\.)?({names})\(") if names else None
    while pattern and (mark := pattern.search(text, at)):
        at = mark.end()
        for end in (found.end() for found in re.compile(r"\)").finditer(text, at)):
            given = _keywords(f"f({text[mark.end() : end]}")
            if given is not None:
                yield ToolCall(mark[1], given)
                at = end
                break


def _keywords(source: str) -> dict[str, Any] | None:
    try:
        tree = ast.parse(source.strip(), mode="eval").body
        if isinstance(tree, ast.Call) and not tree.args:
            return {word.arg: ast.literal_eval(word.value) for word in tree.keywords if word.arg}
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError):
        pass
    return None


def _mapping(text: str) -> dict[str, Any] | None:
    found = _value(text)
    return found if isinstance(found, dict) else None


def _value(text: str) -> Any:
    """A value written as JSON or Python, else the text itself."""
    text = text.strip()
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        found = _literal(text)
        return text if found is None else found


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError):
        return None


def _short(name: str) -> str:
    return name.strip().removeprefix("functions.")
