"""A suite: prompts and what to look for in the answers. Nothing here depends on a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from qguard_edge.verify.results import CheckKind
from quant_grids.errors import QGuardError


class SuiteError(QGuardError):
    """A suite file, or an option about suites, is not usable."""


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt.

    Attributes:
        id: unique in its suite.
        text: the user's message, or the text to continue.
        completion: continue the text as it is, without the chat template.
        system: system message; None for the template's own.
        expected: right answer, for the `exact` matcher; for the `tools` matcher the calls, as a JSON list.
        tags: for people, such as the CWE a code prompt is about.
        turns: what was said before, (role, content) pairs between the system message and `text`.
        tools: what the model may call, each a JSON object as chat templates take it.
    """

    id: str
    text: str
    completion: bool = False
    system: str | None = None
    expected: str | None = None
    tags: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """An answer to judge.

    Attributes:
        text: of the answer.
        ended: the model ended it; False: it was cut at the token limit.
    """

    text: str
    ended: bool


class Matcher(Protocol):
    """Judges answers. One matcher is one check of its suite."""

    @property
    def name(self) -> str:
        """Of the check, unique in its suite."""

    @property
    def title(self) -> str:
        """What is counted, for people: one line."""

    @property
    def kind(self) -> CheckKind:
        """Security, or utility."""

    @property
    def margin(self) -> float | None:
        """Difference of the rates that is still no worse where the user states none; None: that of the kind."""

    def judge(self, prompts: Sequence[SuitePrompt], replies: Sequence[Reply]) -> list[bool | None]:
        """Per answer: True when it shows the (unwanted) behaviour, False when not, None when it cannot be judged."""


class PromptSource(Protocol):
    """Prompts that do not run out: the suite's fixed ones in their order, then generated ones.

    The same for the same seed on every machine, and a longer request begins with what a shorter one gave.
    """

    def prompts(self, start: int, stop: int) -> tuple[SuitePrompt, ...]:
        """Prompts `start` (included) to `stop` (excluded); fewer only when there are no more."""


@dataclass(frozen=True)
class Suite:
    """Prompts and matchers.

    Attributes:
        name: short, lower case; part of every check's name.
        title: what the suite is for: one line.
        prompts: at least one.
        matchers: each one a check; may be empty when `discovery` is on.
        discovery: also look for unknown words and phrases.
        new_tokens: length of the answers at most.
        source: more prompts, which begin with `prompts`; None: these are all.
        optional: left out, with a reason, where the model cannot be asked it at all.
    """

    name: str
    title: str
    prompts: tuple[SuitePrompt, ...]
    matchers: tuple[Matcher, ...]
    discovery: bool = True
    new_tokens: int = 64
    source: PromptSource | None = None
    optional: bool = False
