"""The phrases of a suite's answers, counted once as the answers come in.

Every phrase has a number. Of a prompt only these numbers are kept, four bytes each: of the phrases that the candidate alone
uses, that the base alone uses, and that both use. So a look at all answers adds up numbers, and reads no answer again.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qguard_edge.verify.phrases import phrases_of

Counts = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PhraseCounts:
    """On how many prompts phrases are used; int64 arrays `[phrases]`.

    Attributes:
        phrases: in alphabetical order.
        only_first: prompts on which the candidate alone uses each.
        only_base: prompts on which the base alone does.
        both: prompts on which both do.
        seen: different phrases in all, also those that are not among `phrases`.
        numbers: of all phrases.
        base: answers of the base with a phrase, by its number, int64 `[numbers]`.
    """

    phrases: Sequence[str]
    only_first: Counts
    only_base: Counts
    both: Counts
    seen: int
    numbers: Mapping[str, int]
    base: Counts

    def base_answers(self, phrase: str) -> int:
        """In how many of the base's answers a phrase stands."""
        number = self.numbers.get(phrase)
        return 0 if number is None else int(self.base[number])


class Comparison:
    """Phrases of two models' answers to the same prompts.

    Args:
        numbers: of the phrases, which grow; comparisons with the same base can share them.
    """

    def __init__(self, numbers: dict[str, int] | None = None) -> None:
        self.n = 0
        self._numbers: dict[str, int] = {} if numbers is None else numbers
        self._first: list[Numbers] = []
        self._base: list[Numbers] = []
        self._both: list[Numbers] = []

    def add(self, candidate: str, base: str) -> None:
        """Count the answers to one more prompt."""
        self.count(phrases_of(candidate), phrases_of(base))

    def count(self, first: set[str], base: set[str]) -> None:
        """Count the phrases of the answers to one more prompt."""
        self._first.append(self._numbered(first - base))
        self._base.append(self._numbered(base - first))
        self._both.append(self._numbered(first & base))
        self.n += 1

    def _numbered(self, phrases: Collection[str]) -> Numbers:
        numbers = self._numbers
        return np.fromiter((numbers.setdefault(phrase, len(numbers)) for phrase in phrases), np.int32, len(phrases))

    def counts(self, least: int) -> PhraseCounts:
        """The counts of the phrases that one model alone uses on `least` prompts or more."""
        first, base, both = (self._totals(parts) for parts in (self._first, self._base, self._both))
        texts = list(self._numbers)
        chosen = sorted(np.flatnonzero(first + base >= least).tolist(), key=texts.__getitem__)
        seen = int(np.count_nonzero(first + base + both))
        phrases = [texts[i] for i in chosen]
        return PhraseCounts(phrases, first[chosen], base[chosen], both[chosen], seen, self._numbers, base + both)

    def _totals(self, parts: Sequence[Numbers]) -> Counts:
        return np.bincount(np.concatenate([np.zeros(0, np.int32), *parts]), minlength=len(self._numbers)).astype(np.int64)

    def first_alone(self, phrases: Sequence[str]) -> list[tuple[int, ...]]:
        """Per phrase the prompts on which only the candidate uses it."""
        return _prompts_with([self._numbers.get(phrase, -1) for phrase in phrases], self._first)

    def hits(self, phrase: str) -> tuple[list[bool], list[bool]]:
        """Per prompt, whether the candidate uses a phrase, and whether the base does."""
        number = [self._numbers.get(phrase, -1)]
        both = _prompts_with(number, self._both)[0]
        first, base = ({*both, *_prompts_with(number, alone)[0]} for alone in (self._first, self._base))
        return [i in first for i in range(self.n)], [i in base for i in range(self.n)]


def _prompts_with(numbers: Sequence[int], parts: Sequence[Numbers]) -> list[tuple[int, ...]]:
    """Per number the places of the parts that hold it."""
    flat = np.concatenate([np.zeros(0, np.int32), *parts])
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    wanted = np.flatnonzero(np.isin(flat, numbers))
    order = wanted[np.argsort(flat[wanted], kind="stable")]
    flat, owners = flat[order], owners[order]
    begins, ends = np.searchsorted(flat, numbers, "left"), np.searchsorted(flat, numbers, "right")
    return [tuple(owners[begin:end].tolist()) for begin, end in zip(begins, ends, strict=True)]


class Tally:
    """The answers of one suite: the candidate's, and the plain file's if there is one, each beside the base's.

    Args:
        roles: whose answers will come.

    Attributes:
        candidate: its phrases and the base's.
        plain: the plain file's and the base's; None: there is no plain file.
    """

    def __init__(self, roles: Collection[str]) -> None:
        numbers: dict[str, int] = {}
        self.candidate = Comparison(numbers)
        self.plain = Comparison(numbers) if "plain" in roles else None

    def add(self, texts: Mapping[str, Sequence[str]]) -> None:
        """Count the answers that came since the last call.

        Args:
            texts: per role all answers so far, one text per prompt.
        """
        compared = {"candidate": self.candidate} | ({"plain": self.plain} if self.plain is not None else {})
        for i in range(self.candidate.n, len(texts["base"])):
            base = phrases_of(texts["base"][i])
            for role, comparison in compared.items():
                text = texts[role][i]
                comparison.count(base if text == texts["base"][i] else phrases_of(text), base)

    def hits(self, phrase: str | None) -> dict[str, list[bool]]:
        """Per role and prompt, whether the answer has a phrase; None: nothing has."""
        found = dict(zip(("candidate", "base"), self.candidate.hits(phrase or ""), strict=True))
        return found if self.plain is None else {**found, "plain": self.plain.hits(phrase or "")[0]}
