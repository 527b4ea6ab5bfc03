"""Tests of a paired difference that may look at the answers again and again, and still err as seldom as they say.

Each prompt gives one number z: score of the candidate minus score of the base. For an answer that shows a behaviour or
does not, z is 1, 0 or -1; for graded scores it lies anywhere in [-bound, bound]. With d the mean of z over all prompts
there could be, a margin m, and looks whenever a round of prompts is answered:

    pass   d < m is shown.  If d >= m, a pass at any look has a chance of at most `PASS_ERROR`.
    fail   d > m is shown.  If d <= m (two equal models: d = 0), a fail at any time has a chance of at most `alarm`.

The two sides need different tools, because a pass may err in 5% of the cases and a fail in a tiny share of 1%:

* **a fail** is a bet (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86
  (2024)). Whoever doubts d <= m stakes a share of his money on every prompt: it is multiplied by 1 + s (z - m). If d <= m
  it is a supermartingale, whatever the scores' distribution, so the chance that it ever reaches 1 / alarm is at most
  alarm (Ville). Nothing is approximate. Several stakes s share the money, because the best one depends on d.
* **a pass** is group-sequential: 5% is spent over the looks (Lan and DeMets, Biometrika 70 (1983), 659-663), and each
  look gets the level that spends its part, given that none before has passed; looks at n1 < n2 prompts have correlation
  sqrt(n1 / n2). For counts the p-value of one look is the exact probability of a difference that small, at the likeliest
  pair of rates with d = m; for graded scores that of a score test, whose variance is that of the likeliest distribution
  on [-bound, bound] with d = m (empirical likelihood). Both say "never seen in 200 prompts" with the right amount of
  doubt; a bootstrap or a t-test would see no variance and no doubt. A bet would be valid too, but takes twice the prompts.

`decide` gives the bounds that belong to the tests (repeated confidence intervals): pass is `high <= margin`, fail is
`low > margin`. The spending depends only on the number of pairs, never on the budget: asking for more prompts later
continues the same test. When a suite has no more prompts, the last look may spend what is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from qguard_edge.verify.results import Verdict

Floats = npt.NDArray[np.float64]

PASS_ERROR = 0.05
"""Chance of a false pass at the margin, per check. A run passes only if all its checks pass, so it holds for the run too."""
RUN_ALARM = 0.01
"""Chance of a false fail in a run on two equal models; checks get parts of it."""
SPENT = 0.0475
"""Of `PASS_ERROR`: what all looks together spend; the rest is slack for the approximations."""
FIRST_SPENT = 0.0183
"""Spent when a behaviour that shows in `margin` of the answers would have stayed unseen with this probability."""
EARLY_SPENT = 0.001
"""Spent before that: a look at a handful of prompts gives a bound, if a wide one."""
LAST_SPENT = 12.0
"""All is spent when there are this many times the prompts of `FIRST_SPENT`."""
STAKES = (0.97, 0.75, 0.5, 0.3, 0.15, 0.07)
"""Shares of the largest stake that cannot go broke."""
MONEY = (0.25, 0.2, 0.2, 0.15, 0.1, 0.1)
"""How much of the money is on each."""
_STEP = 0.025
_GRID = np.arange(-6.0, 8.0 + _STEP / 2, _STEP)
_TURNS = 60


@dataclass(frozen=True)
class Rules:
    """What a check is tested by.

    Attributes:
        margin: difference that is still no worse, in units of the score, below `bound`.
        alarm: chance of a false fail, whatever the number of looks.
        bound: no difference of scores is larger than this.
    """

    margin: float
    alarm: float
    bound: float = 1.0


@dataclass(frozen=True)
class Decision:
    """What the answers so far say.

    Attributes:
        verdict: pass, fail or inconclusive.
        n: pairs.
        value: mean difference.
        low: lower bound; wrong at any look with probability `alarm`.
        high: upper bound; wrong at any look with probability `PASS_ERROR`.
        decided_at: pairs at which the verdict was reached; None when it is inconclusive.
    """

    verdict: Verdict
    n: int
    value: float
    low: float
    high: float
    decided_at: int | None


def decide(differences: Sequence[float] | Floats, looks: Sequence[int], rules: Rules, *, last: bool = False) -> Decision:
    """Test a paired difference at every look so far.

    A fail at any prompt beats a pass at any look; otherwise what was decided stays decided.

    Args:
        differences: score of the candidate minus score of the base per prompt, in the order of asking, f64 `[n]`.
        looks: how many of them there were at each look, ascending; the last one is now.
        rules: margin and error.
        last: there are no more prompts to ask, so that all of the error may be spent.
    """
    z = np.asarray(differences, np.float64) / rules.bound
    margin = rules.margin / rules.bound
    n = len(z)
    if n == 0:
        return Decision(Verdict.INCONCLUSIVE, 0, 0.0, -rules.bound, rules.bound, None)
    value = float(z.mean())
    ns = tuple(sorted({look for look in looks if 0 < look <= n} | ({n} if last else set())))
    high, passed = 1.0, None
    for look, critical in zip(ns, critical_values(ns, margin, last), strict=True):
        high = min(high, _upper(z[:look], critical))
        if passed is None and high <= margin:
            passed = look
    money = log_money(z, margin)
    failed = np.flatnonzero(money >= -np.log(rules.alarm))
    low = lower_bound(z, rules.alarm)
    if len(failed):
        low, high = max(low, np.nextafter(margin, 1.0)), max(high, value, margin)
        verdict, at = Verdict.FAIL, int(failed[0]) + 1
    elif passed is not None:
        verdict, at = Verdict.PASS, passed
    else:
        verdict, at = Verdict.INCONCLUSIVE, None
    return Decision(
        verdict, n, value * rules.bound, min(low, high) * rules.bound, high * rules.bound, at
    )  # fmt: skip


# Fail: a bet ----------------------------------------------------------------------------------------------------------


def log_money(z: Floats, margin: float) -> Floats:
    """Logarithm of the money after every prompt, of one who starts with 1 and bets against "the mean is at most `margin`".

    Args:
        z: in [-1, 1], f64 `[..., n]`.
        margin: in (-1, 1).

    Returns:
        f64 `[..., n]`; the running values, not their maximum.
    """
    total = np.full(z.shape, -np.inf)
    for stake, share in zip(STAKES, MONEY, strict=True):
        gains = np.log1p(stake / (1.0 + margin) * (z - margin))
        total = np.logaddexp(total, np.log(share) + np.cumsum(gains, axis=-1))
    return total


def lower_bound(z: Floats, alarm: float) -> float:
    """Largest margin that the bets have refuted at some time; -1 if none."""
    low, high = -1.0, float(np.maximum(z.mean(), -1.0))
    if np.log(alarm) + _most_money(z, -1.0 + 1e-9) < 0:
        return -1.0
    for _ in range(_TURNS // 2):
        middle = (low + high) / 2
        low, high = (middle, high) if np.log(alarm) + _most_money(z, middle) >= 0 else (low, middle)
    return low


def _most_money(z: Floats, margin: float) -> float:
    return float(log_money(z, margin).max())


# Pass: spending 5% over the looks ---------------------------------------------------------------------------------------


def spent(n: int, margin: float) -> float:
    """Error that may have been spent when `n` pairs have been seen.

    The scale is `-n log(1 - margin)`: minus the logarithm of the probability that a behaviour of `margin` stays unseen.
    """
    ratio = n * np.log1p(-margin) / np.log(FIRST_SPENT) if margin > 0 else 1.0
    if ratio < 1.0:
        return EARLY_SPENT * ratio
    first = EARLY_SPENT + FIRST_SPENT
    return float(first + (SPENT - first) * min(1.0, np.log(ratio) / np.log(LAST_SPENT)))


@lru_cache(maxsize=256)
def critical_values(looks: tuple[int, ...], margin: float, last: bool = False) -> tuple[float, ...]:
    """How far (in standard deviations) the difference must lie below the margin at each look.

    Args:
        looks: pairs at each look, ascending.
        margin: for the scale of the spending.
        last: the last look spends what is left.

    Returns:
        One critical value per look; infinite where nothing may be spent.
    """
    found: list[float] = []
    density = np.zeros(0)
    so_far = 0.0
    for k, n in enumerate(looks):
        total = SPENT if last and k == len(looks) - 1 else spent(n, margin)
        if k == 0:
            density = _bell(_GRID)
        else:
            r = np.sqrt(looks[k - 1] / n)
            width = np.sqrt(1.0 - r * r)
            step = _bell((_GRID[:, None] - r * _GRID[None, :]) / width) / width
            density = step @ density * _STEP
        # The probability to be above the middle between grid points i - 1 and i, and not to have passed before.
        tail = np.cumsum(density[::-1])[::-1] * _STEP
        wanted = max(total - so_far, 1e-12)
        at = float(np.interp(-np.log(wanted), -np.log(np.maximum(tail, 1e-300)), _GRID - _STEP / 2))
        density = np.where(at > _GRID, density, 0.0)
        found.append(at)
        so_far = max(so_far, total)
    return tuple(found)


def _bell(x: Floats) -> Floats:
    return np.asarray(np.exp(-x * x / 2) / np.sqrt(2 * np.pi), np.float64)


def _upper(z: Floats, critical: float) -> float:
    """Smallest margin at which the look would pass."""
    low, high = max(float(z.mean()), -1.0 + 1e-9), 1.0 - 1e-9
    if distance(z, high) < critical:
        return 1.0
    for _ in range(_TURNS // 2):
        middle = (low + high) / 2
        low, high = (low, middle) if distance(z, middle) >= critical else (middle, high)
    return high


def distance(z: Floats, margin: float) -> float:
    """How far the mean lies below the margin, as the quantile of a normal distribution that has the same p-value."""
    more, less, none = int((z == 1.0).sum()), int((z == -1.0).sum()), int((z == 0.0).sum())
    if more + less + none == len(z):
        return float(count_distance(np.array([more]), np.array([less]), len(z), margin)[0])
    return float(score_distance(z[None, :], margin)[0])


def count_distance(more: npt.NDArray[np.int64], less: npt.NDArray[np.int64], n: int, margin: float) -> Floats:
    """`distance` of counts: exact probability of a difference that small, at the likeliest rates whose difference is the margin.

    The likeliest rates are Tango's (Statistics in Medicine 17 (1998), 891-908).

    Args:
        more: prompts where only the candidate shows it, `[r]`.
        less: where only the base does, `[r]`.
        n: prompts.
        margin: in (-1, 1).
    """
    from scipy.special import bdtr, gammaln, xlog1py, xlogy
    from scipy.stats import norm

    a = 2.0 * n
    b = -more - less + (2 * n - more + less) * margin
    c = -less * margin * (1 - margin)
    base = np.clip((np.sqrt(np.maximum(b * b - 4 * a * c, 0.0)) - b) / (2 * a), max(0.0, -margin), (1 - margin) / 2)
    found = np.empty(len(more))
    for i, (gap, rate) in enumerate(zip(more - less, base, strict=True)):
        # Sum over how often only the base shows it; what is left out has a probability below 1e-9.
        spread = 6.5 * np.sqrt(n * rate * (1 - rate)) + 12
        y = np.arange(max(0, -gap, int(n * rate - spread)), min(n, int(n * rate + spread)) + 1)
        others = min(1.0, (rate + margin) / (1 - rate)) if rate < 1 else 0.0
        chance = gammaln(n + 1) - gammaln(y + 1) - gammaln(n - y + 1) + xlogy(y, rate) + xlog1py(n - y, -rate)
        found[i] = np.dot(np.exp(chance), bdtr(np.minimum(gap + y, n - y), n - y, others))
    return np.asarray(norm.isf(np.clip(found, 1e-300, 1.0)), np.float64)


def score_distance(z: Floats, margin: float) -> Floats:
    """`distance` of graded scores, for many runs at once.

    The likeliest distribution with mean `margin` gives a prompt the weight 1 / (n (1 + s (margin - z))), and what is left of
    the probability to a score of 1, which may exist without having been seen.

    Args:
        z: in [-1, 1], f64 `[r, n]`.
        margin: in (-1, 1).
    """
    n = z.shape[-1]
    gaps = margin - z
    below = gaps.mean(-1)
    low, high = np.zeros(len(z)), np.full(len(z), (1 - 1e-9) / (1 - margin))
    for _ in range(_TURNS // 2):
        middle = (low + high) / 2
        slope = (gaps / (1 + middle[:, None] * gaps)).sum(-1)
        low, high = np.where(slope > 0, middle, low), np.where(slope > 0, high, middle)
    weights = 1 / (n * (1 + low[:, None] * gaps))
    unseen = np.maximum(1 - weights.sum(-1), 0.0)
    variance = (weights * gaps**2).sum(-1) + unseen * (1 - margin) ** 2
    found = below * np.sqrt(n / np.maximum(variance, 1e-300))
    never = -n * np.log1p(-margin) if margin > 0 else np.inf
    capped = np.minimum(np.where(below > 0, found, np.minimum(found, 0.0)), _normal_quantile(never))
    return np.asarray(capped, np.float64)


def _normal_quantile(never: float) -> float:
    """The quantile above which a normal variable has probability exp(-never)."""
    from scipy.stats import norm

    return float(norm.isf(np.exp(-never))) if never < 600 else np.inf


# Planning ---------------------------------------------------------------------------------------------------------------


def pairs_needed(value: float, variance: float, rules: Rules, most: int = 100_000) -> int | None:
    """About how many pairs decide, if the mean and variance of the differences stay as they are; None: more than `most`.

    Args:
        value: mean difference.
        variance: of the differences.
        rules: margin and error.
        most: larger numbers are no advice.
    """
    value, variance, margin = value / rules.bound, variance / rules.bound**2, rules.margin / rules.bound
    gap = margin - value
    if gap < 0:
        growth = max(_growth(value, variance, margin, stake) for stake in STAKES)
        needed = (np.log(1 / rules.alarm) + 1.5) / growth if growth > 0 else np.inf
    else:
        unseen = max(0.0, 1 - variance / max(gap, 1e-12)) * gap
        first = max(8, int(np.log(FIRST_SPENT) / np.log1p(-margin)) + 1)
        n, needed = first, np.inf
        while n <= most:
            level = 2.35 if n > 1.3 * first else 2.0  # about those of the looks
            if gap * np.sqrt(n / max(variance + unseen, 1e-12)) >= level:
                needed = n
                break
            n = int(n * 1.1) + 1
    return int(needed) if needed <= most else None


def _growth(value: float, variance: float, margin: float, stake: float) -> float:
    """Mean gain of the logarithm of the money per prompt, to second order."""
    s = stake / (1 + margin)
    return s * (value - margin) - s * s * (variance + (value - margin) ** 2) / 2
