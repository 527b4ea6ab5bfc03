"""How far a pass must lean away from plain rounding's error to keep a share of it: found on a sample of rows.

The alignment falls as the lean grows, smoothly, and not far from what it would do if codes need not be whole numbers, which
gives the unit. A few leans on a quarter of the sample tell about where it meets the target; two close to that, on the whole
sample, tell it to about 0.01 for the matrix. All leans of a round are tried in one pass, over copies of the rows.
"""

from collections.abc import Callable, Sequence

LEANS = (0.0, 0.35, 0.7, 1.1)  # of the first round, in units of the lean that would take the whole span
COARSE = 4  # the first round looks at one row of so many
CLOSE = 0.005
STEP = 0.12  # of the second round, to either side, as a share of the lean

Alignments = Callable[[Sequence[float], int], list[float]]
"""The alignment that each of some leans leaves, on one of every so many rows of the sample."""


def find_lean(alignments: Alignments, unit: float, target: float) -> float:
    """The lean that meets a target; 0 if none is needed.

    Args:
        alignments: what leans do.
        unit: the lean that takes a share of 1 off the alignment where codes need not be whole numbers.
        target: the share that may be left.
    """
    span = max(0.3, 0.7 - target)
    lean = 0.0
    for _ in range(4):
        leans = [unit * span * share for share in LEANS]
        found = alignments(leans, COARSE)
        if found[0] <= target + CLOSE:
            break
        lean = leans[-1]
        if found[-1] <= target:
            lean = _crossing(leans, found, target)
            break
        span *= 2.0
    # A quarter of the rows is too few to be sure that nothing is needed.
    leans = [lean * (1.0 - STEP), lean * (1.0 + STEP)] if lean else [0.0, 0.1 * unit]
    low, high = alignments(leans, 1)
    if lean == 0.0 and low <= target + CLOSE:
        return 0.0
    if high >= low:
        return lean
    wanted = leans[0] + (leans[1] - leans[0]) * (low - target) / (low - high)
    return min(max(wanted, 0.5 * lean), 2.0 * leans[1])


def _crossing(leans: Sequence[float], alignments: Sequence[float], target: float) -> float:
    """Where a falling line through some points meets the target, which the last of them has reached."""
    index = next(i for i, alignment in enumerate(alignments) if alignment <= target)
    above, below = alignments[index - 1], alignments[index]
    return leans[index - 1] + (leans[index] - leans[index - 1]) * (above - target) / (above - below)
