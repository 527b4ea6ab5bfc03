"""How long work reports itself: the library talks to this protocol, the command line draws the bars."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


class Progress(Protocol):
    """Told about one stage at a time."""

    def stage(self, name: str, total: int, unit: str) -> None:
        """A stage begins; `total` units will be done (0: unknown)."""

    def advance(self, count: int, detail: str = "") -> None:
        """`count` more units are done; `detail` says what is being worked on."""

    def note(self, text: str) -> None:
        """Something the user should read."""

    def expect(self, stages: Sequence[tuple[str, float]]) -> None:
        """The stages to come, by how their names begin, and about how many seconds each will take."""


class NoProgress:
    """Says nothing."""

    def stage(self, name: str, total: int, unit: str) -> None:
        """See `Progress.stage`."""

    def advance(self, count: int, detail: str = "") -> None:
        """See `Progress.advance`."""

    def note(self, text: str) -> None:
        """See `Progress.note`."""

    def expect(self, stages: Sequence[tuple[str, float]]) -> None:
        """See `Progress.expect`."""


class Remaining:
    """How long the expected stages will still take.

    What is expected tells how the stages compare; how fast this machine is shows on the way. So the time that is left is what
    was expected of it, times the ratio of time spent to what was expected of the work done; in the stage at work, once
    some of it is done, its own speed counts.

    Args:
        stages: see `Progress.expect`.
        clock: seconds.
    """

    TRUST = 0.02  # share of all that is expected which must be done before the machine's own speed counts fully
    BEGUN = 0.03  # share of a stage that must be done before its own speed counts

    def __init__(self, stages: Sequence[tuple[str, float]], clock: Callable[[], float] = time.monotonic) -> None:
        self._stages, self._clock = list(stages), clock
        self._prior = self.TRUST * sum(seconds for _, seconds in stages)
        self._at, self._next = -1, 0
        self._spent = self._worth = 0.0  # of the stages that are over: seconds, and what was expected
        self._started, self._total, self._count = 0.0, 0, 0

    def stage(self, name: str, total: int) -> None:
        """A stage begins, expected or not."""
        now = self._clock()
        if self._at >= 0:
            self._spent += now - self._started
            self._worth += self._stages[self._at][1]
        later = range(self._next, len(self._stages))
        self._at = next((i for i in later if name.startswith(self._stages[i][0])), -1)
        if self._at >= 0:
            self._next = self._at + 1
        self._started, self._total, self._count = now, total, 0

    def advance(self, count: int) -> None:
        """Units of the stage are done."""
        self._count += count

    def seconds(self) -> float:
        """What is left, from the stage at work on."""
        spent, worth, left = self._spent, self._worth, 0.0
        share = min(1.0, self._count / self._total) if self._total else 0.0
        elapsed = self._clock() - self._started
        if self._at >= 0:
            spent += elapsed
            worth += share * self._stages[self._at][1]
        ratio = (spent + self._prior) / (worth + self._prior) if self._prior else 1.0
        if self._at >= 0:
            expected = self._stages[self._at][1] * ratio
            left = elapsed * (1.0 - share) / share if share >= self.BEGUN else expected * (1.0 - share)
        return left + ratio * sum(seconds for _, seconds in self._stages[self._next :])


@dataclass
class Clock:
    """Wall time per stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to a stage's."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
