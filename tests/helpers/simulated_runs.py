"""Simulated runs of the sequential tests: 2,000 pairs of models that answer the same prompts. For tests and a study."""

import numpy as np
import numpy.typing as npt

from qguard_edge.verify.sequential import Rules, count_distance, critical_values, log_money, score_distance

RUNS = 2000
Floats = npt.NDArray[np.float64]


def counts(more: float, less: float, n: int, seed: int = 0) -> Floats:
    """Runs in which only the candidate shows a behaviour on a share `more` of the prompts, only the base on `less`."""
    drawn = np.random.default_rng(seed).random((RUNS, n))
    return (drawn < more).astype(np.float64) - (drawn > 1 - less)


def passed_at(z: Floats, margin: float, looks: tuple[int, ...], last: bool = False) -> npt.NDArray[np.int64]:
    """Pairs at which each run passes; 0 where none does."""
    found = np.zeros(len(z), np.int64)
    whole = bool(np.isin(z[:5], (-1.0, 0.0, 1.0)).all())
    for n, critical in zip(looks, critical_values(looks, margin, last), strict=True):
        part = z[:, :n]
        if whole:
            pairs, where = np.unique(np.stack([(part > 0).sum(1), (part < 0).sum(1)]), axis=1, return_inverse=True)
            far = count_distance(pairs[0], pairs[1], n, margin)[where.ravel()]
        else:
            far = score_distance(part, margin)
        found = np.where((found == 0) & (far >= critical), n, found)
    return found


def failed_at(z: Floats, rules: Rules) -> npt.NDArray[np.int64]:
    """Pairs at which each run fails; 0 where none does."""
    reached = log_money(z, rules.margin) >= -np.log(rules.alarm)
    return np.where(reached.any(1), reached.argmax(1) + 1, 0)


def graded(kind: str, mean: float, n: int, seed: int = 0) -> Floats:
    """Scores with a given mean difference: quiet, noisy, rare large jumps upwards, or rare large ones downwards."""
    r = np.random.default_rng(seed)
    if kind == "quiet":
        return np.clip(mean + 0.05 * r.standard_normal((RUNS, n)), -1, 1)
    if kind == "noisy":
        return np.clip(mean + 0.25 * r.standard_normal((RUNS, n)), -1, 1)
    rare, size = 0.03, 0.8
    up = (r.random((RUNS, n)) < rare) * size
    sign = 1 if kind == "jumps up" else -1
    return np.clip(mean + sign * (up - rare * size) + 0.02 * r.standard_normal((RUNS, n)), -1, 1)
