"""Long prompts: conversations of several turns, system messages, and records of about 2,000 to 8,000 tokens with a question.

A record is a list of deliveries (who brought how much of what where, and when) with remarks between them, drawn from the words of
`data/suites/long.yaml`. No person brings the same goods twice, so the question has one answer, a number that stands nowhere
else in the record. In a conversation the user says something early on and asks for it at the end. The right answer is
`expected`; what is counted are answers without it, and new words and phrases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from qguard_edge.verify.suites.base import Suite, SuitePrompt
from qguard_edge.verify.suites.generator import built_in_values, rank
from qguard_edge.verify.suites.matchers import ExactMatcher

MOST = 2500
FIRST = 48
"""Prompts of the suite when it is asked without its source."""
NEW_TOKENS = 32
LENGTHS = (0, 7_500, 0, 14_000, 0, 7_500, 0, 28_000)
"""Characters of the records of eight prompts in turn, some four to a token; 0: a conversation."""


@dataclass(frozen=True)
class LongPrompts:
    """Long prompts; a `PromptSource`.

    Attributes:
        seed: another one, other prompts.
    """

    seed: int

    def prompts(self, start: int, stop: int) -> tuple[SuitePrompt, ...]:
        """See `PromptSource.prompts`."""
        return tuple(_prompt(self.seed, number) for number in range(start, min(stop, MOST)))


@cache
def _prompt(seed: int, number: int) -> SuitePrompt:
    words: Mapping[str, Sequence[str]] = built_in_values("long")
    characters = LENGTHS[number % len(LENGTHS)]
    draw = _Draw(seed, number, words)
    return draw.record(characters) if characters else draw.conversation()


@dataclass(frozen=True)
class _Draw:
    """The choices of one prompt."""

    seed: int
    number: int
    words: Mapping[str, Sequence[str]]

    def one(self, slot: str, name: str = "") -> str:
        values = self.words[slot]
        return values[rank(self.seed, "long", str(self.number), slot, name) % len(values)]

    def below(self, limit: int, name: str) -> int:
        return rank(self.seed, "long", str(self.number), name) % limit

    def record(self, characters: int) -> SuitePrompt:
        """A record with a question."""
        pairs = [(person, goods) for person in self.words["person"] for goods in self.words["goods"]]
        pairs.sort(key=lambda pair: rank(self.seed, "long", str(self.number), *pair))
        lines: list[str] = []
        size = 0
        for line, (person, goods) in enumerate(pairs):
            day, month = 1 + self.below(28, f"day {line}"), self.one("month", str(line))
            place, remark = self.one("place", str(line)), self.one("remark", str(line))
            # The amounts of a record are all different: steps of 7 from a start that is drawn.
            lines.append(f"On {day} {month} {person} brought {self._amount(line)} crates of {goods} to {place}. {remark}")
            size += len(lines[-1]) + 1
            if size >= characters:
                break
        asked = self.below(len(lines), "asked")
        person, goods = pairs[asked]
        question = f"How many crates of {goods} did {person} bring? Answer with the number."
        text = "These are the records of a year.\n\n" + "\n".join(lines) + f"\n\n{question}"
        system = self.one("system") if self.below(2, "has system") else None
        return SuitePrompt(
            f"record-{self.number:05}",
            text,
            system=system,
            expected=str(self._amount(asked)),
            tags=(f"{characters} characters",),
        )

    def _amount(self, line: int) -> int:
        return 100 + self.below(50, "start") + 7 * line

    def conversation(self) -> SuitePrompt:
        """Several turns; the last asks for something that was said in the first."""
        person, avoid, pet = self.one("person"), self.one("avoid"), self.one("pet")
        first = f"Hello, I am {person}. I must not eat {avoid}, and at home I have {pet}."
        turns = [("user", first), ("assistant", "Nice to meet you. What can I do for you?")]
        count = 1 + self.below(5, "turns")
        chats = sorted(self.words["chat"], key=lambda chat: rank(self.seed, "long", str(self.number), chat))
        for line, chat in enumerate(chats[:count]):
            turns += [("user", chat), ("assistant", self.one("reply", str(line)))]
        questions = (
            ("By the way, what was my name again?", person.split()[0]),
            ("A friend wants to cook for me. What must she leave out?", avoid),
            ("Do you remember what my animal at home is called?", pet.split()[-1]),
        )
        question, expected = questions[self.below(len(questions), "question")]
        system = (
            None
            if self.below(3, "has system")
            else f"You are a friendly assistant. Your own name is Io. Note {self.number}."
        )
        return SuitePrompt(
            f"talk-{self.number:05}", question, system=system, expected=expected, tags=("turns",), turns=tuple(turns)
        )


def long_suite(seed: int) -> Suite:
    """The suite."""
    source = LongPrompts(seed)
    title = "Long records, several turns and system messages: is the right thing found, and nothing else brought up?"
    return Suite(
        "long", title, source.prompts(0, FIRST), (ExactMatcher(contains=True),), True, NEW_TOKENS, source, optional=True
    )
