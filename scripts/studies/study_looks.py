"""After how many prompts do the sequential tests decide, and how often wrongly? The tables of docs/verification.md.

    python scripts/studies/study_looks.py

Simulated: 2,000 pairs of models a row (500 with graded scores) that disagree on a share of the prompts, looked at where
`verify` looks (`qguard_edge.verify.rounds`); a fail with the error of one of the default suites' four counting checks.
"""

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[2]))  # for the simulation, which the tests use too

from qguard_edge.verify.checks import Errors
from qguard_edge.verify.rounds import round_ends
from qguard_edge.verify.sequential import Rules
from qguard_edge.verify.verifier import select_suites
from tests.helpers.simulated_runs import counts, failed_at, graded, passed_at

ALARM = Errors.of(select_suites(["default"])).alarm
ENDS = round_ends(2500)
HONEST = ((0.05, (0.0, 0.02, 0.035, 0.07)), (0.1, (0.05, 0.1, 0.15)), (0.15, (0.2, 0.4)))
SMALL = (0.0, 0.02, 0.05, 0.1, 0.15)
Whole = npt.NDArray[np.int64]


def until(n: int) -> tuple[int, ...]:
    """The looks up to n prompts."""
    return tuple(end for end in ENDS if end <= n)


def share(at: Whole, n: int) -> str:
    """Of the runs those that were decided by n prompts."""
    return f"{((at > 0) & (at <= n)).mean():.0%}"


def at_margin(disagree: float, margin: float, n: int, seed: int) -> npt.NDArray[np.float64]:
    """Models that are worse by the margin, and disagree on at least as many prompts."""
    both = max(disagree, margin)
    return counts((both + margin) / 2, (both - margin) / 2, n, seed)


def honest() -> None:
    """Equal models at the margins of the built-in checks."""
    looks = until(448)
    print("| margin | disagree on |", *(f"{n} |" for n in looks), "passes if it is worse by the margin |")
    print("|---" * (len(looks) + 3) + "|")
    for margin, rows in HONEST:
        for i, q in enumerate(rows):
            passed = passed_at(counts(q / 2, q / 2, looks[-1], i), margin, looks)
            wrong = passed_at(at_margin(q, margin, looks[-1], 10 + i), margin, looks)
            cells = " | ".join(share(passed, n) for n in looks)
            print(f"| {100 * margin:g} points | {100 * q:g}% | {cells} | {share(wrong, looks[-1])} |")


def attacks() -> None:
    """Attacks that take over a share of the answers; on the others the models disagree on a tenth."""
    print("| margin | a share of 1.0 | 0.5 | 0.2 | passes at 0.2, by 1,008 prompts |\n|---|---|---|---|---|")
    for margin in (0.02, 0.05, 0.1, 0.15):
        cells = []
        for success in (1.0, 0.5, 0.2):
            z = counts(success + (1 - success) * 0.05, (1 - success) * 0.05, ENDS[-1], 40)
            at = failed_at(z, Rules(margin, ALARM))
            at = np.where(at == 0, ENDS[-1] + 1, at)
            cells.append(
                ", ".join(f"{q:.0f}" if q <= ENDS[-1] else f"more than {ENDS[-1]}" for q in np.quantile(at, (0.5, 0.95)))
            )
        passed = passed_at(z[:, :1008], margin, until(1008))
        print(f"| {100 * margin:g} points | {' | '.join(cells)} | {(passed > 0).mean():.2%} |")
    z = counts(0.05, 0.0, ENDS[-1], 41)
    at = failed_at(z, Rules(0.02, ALARM))
    half, most = np.quantile(np.where(at == 0, ENDS[-1] + 1, at), (0.5, 0.95))
    print(f"\nmargin 2 points, a share of 0.05, no other disagreement: {half:.0f}, {most:.0f}")


def small_margin() -> None:
    """A margin of 2 points."""
    ns = (208, 448, 1008, 2500)
    print("| models | decided by 208 prompts | by 448 | by 1,008 | by 2,500 | decided wrongly |\n|---|---|---|---|---|---|")
    for i, q in enumerate(SMALL):
        z = counts(q / 2, q / 2, ENDS[-1], 60 + i)
        passed, failed = passed_at(z, 0.02, ENDS), failed_at(z, Rules(0.02, ALARM))
        print(
            f"| equal, disagree on {100 * q:g}% |",
            " | ".join(share(passed, n) for n in ns),
            f"| {(failed > 0).mean():.1%} |",
        )
    for spread in (0.05, 0.1):
        rows = graded("quiet", 0.0, 448, 70)[:500] * (spread / 0.05)
        passed = passed_at(rows, 0.02, until(448))
        print(
            f"| equal, graded scores, standard deviation {spread} |", " | ".join(share(passed, n) for n in ns[:2]), "| | | |"
        )
    wrong = [passed_at(at_margin(q, 0.02, ENDS[-1], 80 + i), 0.02, ENDS) for i, q in enumerate(SMALL[1:])]
    print("| 2 points worse | | | | |", ", ".join(f"{(at > 0).mean():.1%}" for at in wrong), "pass |")


if __name__ == "__main__":
    for table in (honest, attacks, small_margin):
        table()
        print(flush=True)
