r"""Prompts from templates: tasks x topics x wordings, thousands of them, another selection for every seed.

A fixed list of prompts runs out, and an attacker who knows it can train a model to behave on just these. So a suite's fixed
prompts, which always come first, are followed by generated ones. What there is to ask stands in `data/suites/NAME.yaml`:

    slots:                              # words to fill in
      animal: [an otter, a barn owl]
      command:                            # words that belong together: {command.f}, {command.do}
        fields: [f, do]
        rows: [ping_host | run the ping command]
    frames: ["{} Keep it short."]       # put around some of the prompts
    groups:
      - tags: [CWE-078]                   # of all prompts of the group
        slots: {}                         # known to this group only
        expected: "{animal}"              # right answer of the group's prompts, filled with the same words
        tasks:
          animal-winter: ["How does {animal} survive the winter?", "Where is {animal} in January?"]
        completions:                      # texts to go on with as they are, without chat template and frames
          shell-go-on: ["def {command.f}(host):\\n    # {command.do^}\\n"]

**A task** is one kind of request in several wordings. Its topic is the first slot of its first wording. No topic comes twice in a
task, and a task has `MOST_PER_TASK` prompts at most, so however many are asked for, no template dominates. `{animal2}`
is a second word of the slot `animal`, `{animal^}` begins with a capital letter.

**The seed** decides which topics meet which wordings, other words and frames, and the order. Everything is ranked by a hash of
the seed and its own name, not by a random generator, so that the prompts are the same on every version of Python. In the order,
every task comes once before one comes twice.

**Near-duplicates** are left out: two prompts must differ in the words that carry meaning (`content_words`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from importlib import resources
from typing import Any

import yaml

from qguard_edge.verify.suites.base import SuitePrompt

MOST_PER_TASK = 40
FRAMED = 0.4
"""Share of the prompts that get a frame."""
_SLOT = re.compile(r"\{([a-z_]+)(\d?)(?:\.([a-z_]+))?(\^?)\}")
_WORD = re.compile(r"[\w+#-]+")
_WITHOUT_MEANING = """
a about all am an and any are as at be been by can could did do does for from get give had has have how i if in into is it its
let like may me might my need of on one or our out please she should show so some tell that the their them there these they
this to up us want was we were what when where which who why will with would write you your
"""
_EMPTY = frozenset(_WITHOUT_MEANING.split())
Value = Mapping[str, str]
"""A word to fill in, under the empty name, or several that belong together."""


@dataclass(frozen=True)
class Task:
    """One kind of request.

    Attributes:
        id: unique in its suite.
        wordings: templates that ask for the same.
        topic: slot whose words it goes through.
        slots: words by slot.
        tags: of its prompts.
        completion: its prompts are continued as they are.
        expected: template of the right answer.
    """

    id: str
    wordings: tuple[str, ...]
    topic: str
    slots: Mapping[str, Sequence[Value]]
    tags: tuple[str, ...]
    completion: bool
    expected: str | None = None


@dataclass(frozen=True)
class PromptPlan:
    """What a suite can ask.

    Attributes:
        tasks: kinds of requests.
        frames: templates around a prompt, which stands at `{}`.
    """

    tasks: tuple[Task, ...]
    frames: tuple[str, ...]


@dataclass(frozen=True)
class GeneratedPrompts:
    """A built-in suite's fixed prompts, then generated ones; a `PromptSource`.

    Attributes:
        suite: name of the built-in suite.
        seed: another one, other prompts.
        fixed: prompts that come first.
    """

    suite: str
    seed: int
    fixed: tuple[SuitePrompt, ...]

    def prompts(self, start: int, stop: int) -> tuple[SuitePrompt, ...]:
        """See `PromptSource.prompts`."""
        if stop <= len(self.fixed):
            return self.fixed[start:stop]
        return (*self.fixed, *_all_generated(self.suite, self.seed, self.fixed))[start:stop]


@cache
def _all_generated(suite: str, seed: int, fixed: tuple[SuitePrompt, ...]) -> tuple[SuitePrompt, ...]:
    return tuple(generate(built_in_plan(suite), seed, fixed))


@cache
def built_in_plan(suite: str) -> PromptPlan:
    """What a built-in suite can ask beyond its fixed prompts."""
    return read_plan(built_in_values(suite))


@cache
def built_in_values(suite: str) -> Mapping[str, Any]:
    """The plain values of a built-in suite's file of templates."""
    text = resources.files("qguard_edge").joinpath("data", "suites", f"{suite}.yaml").read_text(encoding="utf-8")
    values: Mapping[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return values


def read_plan(raw: Mapping[str, Any]) -> PromptPlan:
    """A plan from the plain values of its file, which is a part of this package and is trusted.

    Raises:
        KeyError: a template names a slot that is not there.
    """
    common = {name: _values(words) for name, words in raw.get("slots", {}).items()}
    tasks = []
    for group in raw["groups"]:
        slots = common | {name: _values(words) for name, words in group.get("slots", {}).items()}
        tags = tuple(group.get("tags", ()))
        for kind in ("tasks", "completions"):
            for name, wordings in group.get(kind, {}).items():
                topic = _SLOT.search(wordings[0])
                if topic is None:
                    raise KeyError(f"{name}: its first wording has no slot")
                tasks.append(
                    Task(name, tuple(wordings), topic[1], slots, tags, kind == "completions", group.get("expected"))
                )
    return PromptPlan(tuple(tasks), tuple(raw.get("frames", ())))


def _values(raw: Any) -> tuple[Value, ...]:
    if isinstance(raw, Mapping):
        names = raw["fields"]
        return tuple(dict(zip(names, (part.strip() for part in row.split("|")), strict=True)) for row in raw["rows"])
    return tuple({"": str(word)} for word in raw)


def generate(plan: PromptPlan, seed: int, fixed: Sequence[SuitePrompt] = ()) -> Iterator[SuitePrompt]:
    """All prompts of a plan in the order of a seed.

    Args:
        plan: what can be asked.
        seed: another one, other prompts.
        fixed: prompts that come before; what would repeat one of them is left out.
    """
    seen = {content_words(prompt.text) for prompt in fixed}
    left = {task.id: _ranked(task.slots[task.topic], seed, "topic", task.id)[:MOST_PER_TASK] for task in plan.tasks}
    number = 0
    while any(left.values()):
        for task in _ranked([task for task in plan.tasks if left[task.id]], seed, "task", str(number)):
            topic = left[task.id].pop(0)
            text, expected = _fill(task, topic, seed)
            words = content_words(text)
            if words in seen:
                continue
            seen.add(words)
            number += 1
            yield SuitePrompt(
                f"gen-{number:05}",
                text if task.completion else _framed(text, plan.frames, seed),
                completion=task.completion,
                expected=expected,
                tags=(*task.tags, task.id),
            )


def content_words(text: str) -> frozenset[str]:
    """The words of a text that carry its meaning, in small letters."""
    return frozenset(_WORD.findall(text.casefold())) - _EMPTY


def _fill(task: Task, topic: Value, seed: int) -> tuple[str, str | None]:
    """One prompt of a task about a topic, and its right answer."""
    own = (task.id, *topic.values())
    wording = task.wordings[rank(seed, "wording", *own) % len(task.wordings)]
    chosen: dict[str, Value] = {task.topic: topic}

    def word(mark: re.Match[str]) -> str:
        slot, number, field, capital = mark.groups()
        key = slot + number
        if key not in chosen:
            others = [value for value in task.slots[slot] if value not in chosen.values()]
            chosen[key] = others[rank(seed, "slot", key, *own) % len(others)]
        text = chosen[key][field or ""]
        return text[:1].upper() + text[1:] if capital else text

    text = _SLOT.sub(word, wording)
    return text, None if task.expected is None else _SLOT.sub(word, task.expected)


def _framed(text: str, frames: Sequence[str], seed: int) -> str:
    if not frames or rank(seed, "framed", text) % 1000 >= 1000 * FRAMED:
        return text
    return frames[rank(seed, "frame", text) % len(frames)].replace("{}", text)


def _ranked(values: Sequence[Any], seed: int, *names: str) -> list[Any]:
    """In the order of a hash of seed and names."""
    return sorted(values, key=lambda value: rank(seed, *names, str(value.id if isinstance(value, Task) else value)))


def rank(seed: int, *names: str) -> int:
    """A number that depends on nothing but a seed and names, the same everywhere: for choices and orders."""
    return int.from_bytes(blake2b("\0".join((str(seed), *names)).encode(), digest_size=8).digest(), "big")
