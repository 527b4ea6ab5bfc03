"""Suites as the plain values of a suite file, and back: what lets a pack carry its own suites.

A suite file's `refusal`, `bandit` and `tools` each make several checks; so several matchers become one entry again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qguard_edge.verify.suites.base import Matcher, Suite, SuiteError
from qguard_edge.verify.suites.code import BanditMatcher, UnparsedMatcher
from qguard_edge.verify.suites.files import parse_suite
from qguard_edge.verify.suites.matchers import ExactMatcher, PhraseMatcher, RefusalMatcher, RegexMatcher
from qguard_edge.verify.suites.tools import ToolMatcher


def suite_of(fields: Mapping[str, Any]) -> Suite:
    """A suite from plain values.

    Raises:
        SuiteError: they are not valid.
    """
    return parse_suite(dict(fields), "the pack")


def matchers_as_values(matchers: Sequence[Matcher]) -> tuple[dict[str, Any], ...]:
    """The matchers of a suite as entries of a suite file.

    Raises:
        SuiteError: a matcher that no suite file can name.
    """
    return tuple(entry for matcher in matchers for entry in _entry(matcher))


def _entry(matcher: Matcher) -> list[dict[str, Any]]:
    match matcher:
        case PhraseMatcher():
            words = {"phrases": list(matcher.phrases)}
            return [{"type": "phrases", "name": matcher.name, "kind": str(matcher.kind), **words}]
        case RegexMatcher():
            patterns = {"patterns": list(matcher.patterns)}
            return [{"type": "regex", "name": matcher.name, "kind": str(matcher.kind), **patterns}]
        case ExactMatcher():
            return [{"type": "exact", "name": matcher.name, "contains": matcher.contains}]
        case BanditMatcher():
            return [{"type": "bandit", "severity": matcher.severity, "also": list(matcher.also)}]
        case RefusalMatcher():
            return [] if matcher.with_reason else [{"type": "refusal"}]
        case ToolMatcher():
            return [{"type": "tools"}] if matcher.name == "wrong-tool" else []
        case UnparsedMatcher():
            return []  # comes with bandit
        case _:
            raise SuiteError(f"a pack cannot carry a matcher of the kind {type(matcher).__name__}")
