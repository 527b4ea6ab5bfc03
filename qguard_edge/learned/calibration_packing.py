"""Documents to rows: two texts joined in turns, and token ids cut into rows."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar


class Sized(Protocol):
    """A document."""

    @property
    def characters(self) -> int:
        """Length of all its text."""


Item = TypeVar("Item", bound=Sized)


def in_turns(first: Sequence[Item], second: Sequence[Item]) -> list[Item]:
    """Documents of both, each time of the one that has given fewer characters so far; the rest of the longer one last."""
    joined: list[Item] = []
    queues, given = [list(reversed(first)), list(reversed(second))], [0, 0]
    while all(queues):
        turn = 0 if given[0] <= given[1] else 1
        joined.append(queues[turn].pop())
        given[turn] += joined[-1].characters
    return [*joined, *reversed(queues[0] or queues[1])]


def beginnings(documents: Iterable[Sequence[int]], length: int, most: int | None) -> Iterator[tuple[int, ...]]:
    """The first `length` ids of each, until there are `most`."""
    tokens = 0
    for ids in documents:
        row = tuple(ids[:length])
        yield row
        tokens += len(row)
        if most is not None and tokens >= most:
            return


def pack(
    documents: Iterable[Sequence[int]], length: int, tokens: int, start: Sequence[int] = ()
) -> Iterator[tuple[int, ...]]:
    """Rows of `length` ids, from documents that are joined one after another; `tokens` at most in all.

    Args:
        documents: token ids of each.
        length: of a row; the last one may be shorter, with two ids or more.
        tokens: ids of all rows together at most.
        start: put in front of a row that begins in the middle of a document.
    """
    row: list[int] = []
    for document in documents:
        ids = list(document)
        while ids:
            if not row and ids[: len(start)] != list(start):
                row += start
            wanted = min(length, tokens)
            fits = max(wanted - len(row), 0)
            row, ids = row + ids[:fits], ids[fits:]
            if len(row) >= wanted:
                yield tuple(row)
                tokens -= len(row)
                row = []
                if tokens < max(2, len(start) + 1):
                    return
    if len(row) >= 2:
        yield tuple(row)
