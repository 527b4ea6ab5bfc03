r"""Read suites: the built-in ones, and users' own in YAML or JSON lines.

YAML (`.yaml`, `.yml`), one document:

    name: support-bot             # short, lower case
    title: Answers of our support bot
    new_tokens: 64                # length of the answers at most
    discovery: true               # look for unknown words and phrases too
    matchers:
      - {type: phrases, phrases: [Acme, "buy now"]}
      - {type: regex, patterns: ["(?i)https?://"]}
      - {type: refusal}           # two checks: refusals, and refusals with a reason
      - {type: bandit, severity: medium}     # two checks: insecure, and unparsed
      - {type: exact, contains: true}        # needs `expected` in the prompts
      - {type: tools}             # four checks on tool calls; needs `tools` and `expected` in the prompts
    prompts:
      - How do I reset my password?          # the short form
      - {id: hours, text: "When are you open?", expected: nine to five}
      - {id: snippet, text: "def add(a, b):\n", completion: true}
      - {text: "And on Sundays?", turns: [{role: user, content: Hi}, {role: assistant, content: Hello}]}

JSON lines (`.jsonl`): the first line is an object with everything but the prompts, every other line is one prompt.

Files are read as data: PyYAML's safe loader, no tags, no code; unknown keys are errors, because a misspelt `phrases` would
otherwise be a check that can never fail.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from convert.reading import read_text
from qguard_edge.verify.results import CheckKind
from qguard_edge.verify.suites.base import Matcher, Suite, SuiteError, SuitePrompt
from qguard_edge.verify.suites.code import ALSO, SEVERITIES, BanditMatcher, UnparsedMatcher
from qguard_edge.verify.suites.generator import GeneratedPrompts
from qguard_edge.verify.suites.long import long_suite
from qguard_edge.verify.suites.matchers import ExactMatcher, PhraseMatcher, RefusalMatcher, RegexMatcher
from qguard_edge.verify.suites.tools import tool_matchers, tools_suite

BUILT_IN = ("injection", "refusal", "code")
OPTIONAL: Mapping[str, Callable[[int], Suite]] = {
    "tools": tools_suite,
    "long": long_suite,
    "languages": lambda seed: _languages_suite(seed),
}
"""Built-in suites that are not asked unless they are named, or `all` is; made by a seed."""
FIRST_LANGUAGES = 150
MOST_BYTES = 16 << 20
MOST_PROMPTS = 100_000
LONGEST_PROMPT = 100_000
MOST_NEW_TOKENS = 8192
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")


def built_in(name: str, seed: int = 0) -> Suite:
    """A suite of this package, with a source of more prompts.

    Args:
        name: one of `BUILT_IN` or `OPTIONAL`.
        seed: of the source.

    Raises:
        SuiteError: there is no such suite.
    """
    if name in OPTIONAL:
        return OPTIONAL[name](seed)
    if name not in BUILT_IN:
        known = ", ".join((*BUILT_IN, *OPTIONAL, "drift"))
        raise SuiteError(f"--suites {name!r}: choose among {known}, or give a file with --suite")
    text = resources.files("qguard_edge").joinpath("data", "suites", f"{name}.jsonl").read_text(encoding="utf-8")
    suite = parse_suite(_json_lines(text, name), name)
    return replace(suite, source=GeneratedPrompts(name, seed, suite.prompts))


def _languages_suite(seed: int) -> Suite:
    source = GeneratedPrompts("languages", seed, ())
    title = "Harmless requests in ten languages: does the answer bring up something nobody asked for?"
    return Suite("languages", title, source.prompts(0, FIRST_LANGUAGES), (), True, 48, source, optional=True)


def read_suite(path: Path) -> Suite:
    """A user's suite file.

    Raises:
        SuiteError: it cannot be read or is not a suite; one sentence that names the place.
    """
    try:
        text = read_text(path, MOST_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"cannot read the suite {path.name} as UTF-8: {error}") from error
    if path.suffix in (".yaml", ".yml"):
        return parse_suite(_yaml(text, path.name), path.name)
    if path.suffix in (".jsonl", ".ndjson"):
        return parse_suite(_json_lines(text, path.name), path.name)
    raise SuiteError(f"{path.name}: a suite file ends in .yaml, .yml or .jsonl")


def _yaml(text: str, where: str) -> Any:
    import yaml

    # An alias can repeat a large part a billion times in a few lines; no suite needs one.
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise SuiteError(f"{where} uses a YAML alias (*name); write the value out")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SuiteError(f"{where} is not valid YAML: {reason[:200]}") from error


def _json_lines(text: str, where: str) -> Any:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise SuiteError(f"{where}, line {number}: not valid JSON ({error})") from error
    if not rows or not isinstance(rows[0], dict):
        raise SuiteError(f"{where}: the first line must be an object with name, title and matchers")
    return {**rows[0], "prompts": rows[1:]}


def parse_suite(raw: Any, where: str) -> Suite:
    """A suite from plain values; `where` names the file in errors.

    Raises:
        SuiteError: a value is missing, unknown or out of range.
    """
    fields = _object(raw, where, {"name", "title", "new_tokens", "discovery", "matchers", "prompts"})
    name = _text(fields.get("name"), f"{where}: name")
    if not _NAME.fullmatch(name):
        raise SuiteError(f"{where}: the name {name!r} must be lower-case letters, digits, - and _, 40 at most")
    new_tokens = fields.get("new_tokens", 64)
    if not isinstance(new_tokens, int) or isinstance(new_tokens, bool) or not 1 <= new_tokens <= MOST_NEW_TOKENS:
        raise SuiteError(f"{where}: new_tokens is {new_tokens!r}; it must be a number from 1 to {MOST_NEW_TOKENS}")
    matchers: list[Matcher] = []
    for i, entry in enumerate(_list(fields.get("matchers", []), f"{where}: matchers"), 1):
        matchers += _matchers(entry, f"{where}, matcher {i}")
    discovery = _flag(fields.get("discovery", True), f"{where}: discovery")
    names = [matcher.name for matcher in matchers] + (["discovery"] if discovery else [])
    if not names:
        raise SuiteError(f"{where} has no matcher and no discovery: there is nothing to look for")
    if len(set(names)) != len(names):
        raise SuiteError(f"{where}: two checks have the same name; give each matcher a name of its own (name: ...)")
    prompts = _prompts(_list(fields.get("prompts", []), f"{where}: prompts"), where)
    return Suite(name, _text(fields.get("title", name), f"{where}: title"), prompts, tuple(matchers), discovery, new_tokens)


def _prompts(raw: Sequence[Any], where: str) -> tuple[SuitePrompt, ...]:
    if not 1 <= len(raw) <= MOST_PROMPTS:
        raise SuiteError(f"{where} has {len(raw)} prompts; a suite has 1 to {MOST_PROMPTS}")
    prompts = tuple(_prompt(entry, i, where) for i, entry in enumerate(raw, 1))
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise SuiteError(f"{where}: two prompts have the id {prompt.id!r}")
        seen.add(prompt.id)
    return prompts


def _prompt(raw: Any, number: int, where: str) -> SuitePrompt:
    here = f"{where}, prompt {number}"
    if isinstance(raw, str):
        raw = {"text": raw}
    fields = _object(raw, here, {"id", "text", "completion", "system", "expected", "tags", "turns", "tools"})
    text = _text(fields.get("text"), f"{here}: text")
    if len(text) > LONGEST_PROMPT:
        raise SuiteError(f"{here} has {len(text)} characters; {LONGEST_PROMPT} is the limit")
    optional = {key: _text(fields[key], f"{here}: {key}") for key in ("system", "expected") if fields.get(key) is not None}
    return SuitePrompt(
        id=_text(fields.get("id", f"{number:04}"), f"{here}: id"),
        text=text,
        completion=_flag(fields.get("completion", False), f"{here}: completion"),
        system=optional.get("system"),
        expected=optional.get("expected"),
        tags=_texts(fields.get("tags", []), f"{here}: tags", least=0),
        turns=tuple(_turn(turn, f"{here}: turns") for turn in _list(fields.get("turns", []), f"{here}: turns")),
        tools=tuple(_tool(tool, f"{here}: tools") for tool in _list(fields.get("tools", []), f"{here}: tools")),
    )


def _turn(raw: Any, where: str) -> tuple[str, str]:
    fields = _object(raw, where, {"role", "content"})
    role = _text(fields.get("role"), f"{where}: role")
    if role not in ("user", "assistant"):
        raise SuiteError(f"{where}: the role is {role!r}; choose user or assistant")
    return role, _text(fields.get("content"), f"{where}: content")


def _tool(raw: Any, where: str) -> str:
    """A tool as chat templates take it; `type` and `function` may be left out around it."""
    fields = _object(raw, where, None)
    inner = _object(fields.get("function", fields), where, None)
    _text(inner.get("name"), f"{where}: name")
    return json.dumps({"type": "function", "function": dict(inner)})


def _matchers(raw: Any, where: str) -> list[Matcher]:
    fields = dict(_object(raw, where, None))
    kind = fields.pop("type", None)
    if kind not in MATCHERS:
        raise SuiteError(f"{where}: the type is {kind!r}; choose one of {', '.join(MATCHERS)}")
    known, make = MATCHERS[kind]
    _object(fields, where, known)
    return make(fields, where)


def _make_phrases(fields: Mapping[str, Any], where: str) -> list[Matcher]:
    phrases = _texts(fields.get("phrases"), f"{where}: phrases")
    return [PhraseMatcher(phrases, _name(fields, where, "phrases"), _kind(fields, where))]


def _make_regex(fields: Mapping[str, Any], where: str) -> list[Matcher]:
    patterns = _texts(fields.get("patterns"), f"{where}: patterns")
    return [RegexMatcher(patterns, _name(fields, where, "regex"), _kind(fields, where))]


def _make_refusal(_fields: Mapping[str, Any], _where: str) -> list[Matcher]:
    return [RefusalMatcher(), RefusalMatcher(with_reason=True, name="refusals-with-reason")]


def _make_bandit(fields: Mapping[str, Any], where: str) -> list[Matcher]:
    severity = _text(fields.get("severity", "medium"), f"{where}: severity")
    if severity not in SEVERITIES:
        raise SuiteError(f"{where}: the severity is {severity!r}; choose one of {', '.join(SEVERITIES)}")
    also = _texts(fields.get("also", list(ALSO)), f"{where}: also", least=0)
    return [BanditMatcher(severity, also), UnparsedMatcher()]


def _make_tools(_fields: Mapping[str, Any], _where: str) -> list[Matcher]:
    return list(tool_matchers())


def _make_exact(fields: Mapping[str, Any], where: str) -> list[Matcher]:
    contains = _flag(fields.get("contains", False), f"{where}: contains")
    return [ExactMatcher(contains, _name(fields, where, "wrong"))]


MATCHERS: Mapping[str, tuple[set[str], Callable[[Mapping[str, Any], str], list[Matcher]]]] = {
    "phrases": ({"phrases", "name", "kind"}, _make_phrases),
    "regex": ({"patterns", "name", "kind"}, _make_regex),
    "refusal": (set(), _make_refusal),
    "bandit": ({"severity", "also"}, _make_bandit),
    "exact": ({"contains", "name"}, _make_exact),
    "tools": (set(), _make_tools),
}


def _name(fields: Mapping[str, Any], where: str, default: str) -> str:
    name = _text(fields.get("name", default), f"{where}: name")
    if not _NAME.fullmatch(name):
        raise SuiteError(f"{where}: the name {name!r} must be lower-case letters, digits, - and _, 40 at most")
    return name


def _kind(fields: Mapping[str, Any], where: str) -> CheckKind:
    kind = _text(fields.get("kind", "security"), f"{where}: kind")
    if kind not in ("security", "utility"):
        raise SuiteError(f"{where}: the kind is {kind!r}; choose security or utility")
    return CheckKind(kind)


def _object(raw: Any, where: str, known: set[str] | None) -> Mapping[str, Any]:
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise SuiteError(f"{where}: expected an object with named values, got {_short(raw)}")
    unknown = sorted(raw.keys() - known) if known is not None else []
    if unknown:
        raise SuiteError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known or ())) or 'none'}")
    return raw


def _list(raw: Any, where: str) -> Sequence[Any]:
    if not isinstance(raw, list):
        raise SuiteError(f"{where}: expected a list, got {_short(raw)}")
    return raw


def _text(raw: Any, where: str) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise SuiteError(f"{where}: expected a text that is not empty, got {_short(raw)}")
    return raw


def _texts(raw: Any, where: str, least: int = 1) -> tuple[str, ...]:
    texts = tuple(_text(entry, where) for entry in _list(raw, where))
    if len(texts) < least:
        raise SuiteError(f"{where}: the list is empty")
    return texts


def _flag(raw: Any, where: str) -> bool:
    if not isinstance(raw, bool):
        raise SuiteError(f"{where}: expected true or false, got {_short(raw)}")
    return raw


def _short(raw: Any) -> str:
    text = repr(raw)
    return text if len(text) <= 40 else f"{text[:40]}..."
