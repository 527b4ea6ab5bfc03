"""How long work reports itself: the library talks to this protocol, the command line draws the bars."""

import time
from collections.abc import Iterator
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


class NoProgress:
    """Says nothing."""

    def stage(self, name: str, total: int, unit: str) -> None:
        """See `Progress.stage`."""

    def advance(self, count: int, detail: str = "") -> None:
        """See `Progress.advance`."""

    def note(self, text: str) -> None:
        """See `Progress.note`."""


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
