"""Ask in rounds until every check is decided, or the prompts, the time or the hope run out.

    round k: the next prompts of every suite that has an undecided check -> answers of every file -> a look at each check

Rounds grow by about half (64, 96, 160, 208, 304 ... prompts of a suite), so that there are few looks and little is asked in vain;
two of them end where something that is usual in an honest file is decided (`ENDS`).
Prompts that the suite lists come in an order drawn with the seed: lists are sorted by topic, and the first 64 must be of all
topics. A suite is left when all its checks are decided, or when those that are not would need more prompts than may be asked
even if the difference is one and a half standard errors better (or worse) than it looks; giving up never makes a verdict
wrong, only inconclusive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from qguard_edge.verify.checks import Errors, Found, Margins, SuiteAnswers, look_at
from qguard_edge.verify.counting import Tally
from qguard_edge.verify.results import Check, Verdict
from qguard_edge.verify.suites.base import Reply, Suite, SuitePrompt

ENDS = (64, 96, 160, 208)
"""The first rounds. Discovery can rule out a new phrase in 15% of the answers after about 150 prompts (at 144 it would just
miss it), and a behaviour that nobody shows passes a margin of 2 points after 199."""
GROWTH = 1.5
GRAIN = 16
"""Later rounds end at multiples of this, so that sequences side by side are filled."""
MOST_PROMPTS = 2500
"""Prompts per suite, unless the user says otherwise."""


def round_ends(most: int) -> tuple[int, ...]:
    """Prompts that have been asked at the end of each round, `most` at the end of the last."""
    ends = [end for end in ENDS if end < most]
    end = ENDS[-1]
    while (end := int(end * GROWTH) // GRAIN * GRAIN) < most:
        ends.append(end)
    return (*ends, most)


def in_drawn_order(prompts: Sequence[SuitePrompt], seed: int) -> tuple[SuitePrompt, ...]:
    """The prompts in an order that depends on the seed and their ids alone."""
    return tuple(sorted(prompts, key=lambda prompt: blake2b(f"{seed}\0{prompt.id}".encode(), digest_size=8).digest()))


@dataclass
class SuiteRun:
    """One suite while it is asked.

    Attributes:
        suite: as it was given; `prompts` are its fixed ones.
        samples: answers per prompt.
        seed: of the order.
        most: prompts at most.
        roles: whose answers will come; the candidate's and the base's are judged.
        reached: prompts that were tried so far, those that could not be sent to a server among them.
        prompts: asked so far.
        replies: per role, answer `i * samples + s` is sample s on prompt i.
        judged: per matcher and role.
        looks: prompts at the end of every round.
        found: checks as of the last look, without evidence.
        exhausted: the suite has no more prompts than were asked.
    """

    suite: Suite
    samples: int
    seed: int
    most: int
    roles: Sequence[str]
    reached: int = 0
    prompts: list[SuitePrompt] = field(default_factory=list)
    replies: dict[str, list[Reply]] = field(default_factory=dict)
    judged: dict[str, dict[str, list[bool | None]]] = field(default_factory=dict)
    looks: list[int] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    exhausted: bool = False

    def __post_init__(self) -> None:
        self._fixed = in_drawn_order(self.suite.prompts, self.seed)
        self.replies = {role: [] for role in self.roles}
        self._tally = Tally(self.roles)
        self.judged = {matcher.name: {role: [] for role in self.roles} for matcher in self.suite.matchers}

    def upcoming(self, start: int, stop: int) -> tuple[SuitePrompt, ...]:
        """Prompts `start` to `stop` in the order of asking; fewer when there are no more, or no more may be asked."""
        stop = min(stop, self.most)
        found = self._fixed[start:stop]
        fixed = len(self._fixed)
        if stop > fixed and self.suite.source is not None:
            found += self.suite.source.prompts(max(start, fixed), stop)
        return found

    def take(self, prompts: Sequence[SuitePrompt], replies: Mapping[str, Sequence[Reply]]) -> None:
        """Answers to the next prompts; judges them."""
        self.prompts += prompts
        repeated = [prompt for prompt in prompts for _ in range(self.samples)]
        for role, given in replies.items():
            self.replies[role] += given
            for matcher in self.suite.matchers:
                self.judged[matcher.name][role] += matcher.judge(repeated, given)

    def look(self, margins: Margins, errors: Errors) -> None:
        """A look at all checks, at the end of a round."""
        self.looks.append(len(self.prompts))
        self.exhausted = not self._more(self.reached)
        self.found = look_at(self.answers(), margins, errors, self.found)

    def _more(self, n: int) -> bool:
        """Whether there is a prompt after the first n."""
        return n < len(self._fixed) or (self.suite.source is not None and bool(self.suite.source.prompts(n, n + 1)))

    def answers(self) -> SuiteAnswers:
        """What has been answered, as checks read it."""
        return SuiteAnswers(
            replace(self.suite, prompts=tuple(self.prompts)),
            self.samples,
            self.replies,
            tuple(self.looks),
            self.exhausted,
            self.judged,
            self._tally,
        )

    @property
    def open_checks(self) -> list[Check]:
        """Checks that more prompts, as many as may be asked, could still decide."""
        return [
            found.check
            for found in self.found
            if found.check.verdict is Verdict.INCONCLUSIVE and (found.best_case is None or found.best_case <= self.most)
        ]

    @property
    def failed(self) -> bool:
        """A check fails."""
        return any(found.check.verdict is Verdict.FAIL for found in self.found)

    @property
    def finished(self) -> bool:
        """Nothing more is to be asked."""
        if not self.looks:
            return False
        return self.reached >= self.most or self.exhausted or not self.open_checks
