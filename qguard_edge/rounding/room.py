"""How much memory the walk of `by_inputs` takes, and how it is made to fit.

What grows with a matrix of `n` columns: a factor that is kept (f32 `[n, n]`), the making of one (f64 and f32 beside each other;
the Gram matrix itself is mapped from its file), and the sample of rows that a rule is settled with. Every thread holds one
slice of rows. Under a limit, first fewer factors are kept, then the next matrix is not prepared while one is rounded, then
fewer threads work. None of it changes the result.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from quant_grids.errors import QGuardError

SLICE_WEIGHTS = 1 << 20
"""Longer columns make each of the pass's many small steps worth its overhead; more weights would leave the cache."""
SAMPLE_RUNS, SAMPLE_ROWS = 24, 8
KEPT_FACTORS = 2  # q and v of a llama share their inputs, with the output projection between them
SLICE_ARRAYS = 20  # f32 arrays of a slice's size that rounding it holds at most, measured
SAMPLE_ARRAYS = 40  # the same for the sample, of which several copies are rounded side by side


class RoomError(QGuardError):
    """Choosing the codes needs more memory than it is allowed to use."""


@dataclass(frozen=True)
class Room:
    """What the walk holds at a time.

    Attributes:
        workers: threads, each with a slice.
        kept: factors.
        ahead: whether the next matrix is prepared while one is rounded.
    """

    workers: int
    kept: int = KEPT_FACTORS
    ahead: bool = True

    def bytes_for(self, columns: int, weights: int = SLICE_WEIGHTS) -> int:
        """Bytes at most, with matrices of up to so many columns, and up to so many weights.

        Of the factors that are kept, one is the matrix's that is being rounded; the one that is being made comes on top.
        """
        factor = 4 * columns * columns
        making = 3 * factor + 4 * SAMPLE_RUNS * SAMPLE_ROWS * columns * SAMPLE_ARRAYS
        slices = self.workers * 4 * max(min(SLICE_WEIGHTS, weights), columns) * SLICE_ARRAYS
        held = self.kept * factor
        return held + making + slices if self.ahead else max(held - factor + making, held + slices)


def rooms(threads: int) -> Iterator[Room]:
    """What may be tried under a limit, the fastest first."""
    yield Room(threads)
    yield Room(threads, kept=1)
    while threads:
        yield Room(threads, kept=1, ahead=False)
        threads //= 2


def room_for(columns: int, threads: int, budget: int | None) -> Room:
    """The fastest that fits.

    Args:
        columns: of the widest matrix.
        threads: at most.
        budget: bytes beyond what the process holds already; None: no limit.

    Raises:
        RoomError: nothing fits.
    """
    if budget is None:
        return Room(threads)
    for room in rooms(threads):
        if room.bytes_for(columns) <= budget:
            return room
    least = Room(1, kept=1, ahead=False).bytes_for(columns)
    raise RoomError(
        f"choosing the codes of matrices of {columns} columns takes {least >> 20} MiB, and of the memory that is allowed "
        f"{max(0, budget) >> 20} MiB are left; raise --max-memory by {((least - budget) >> 20) + 1} MiB"
    )
