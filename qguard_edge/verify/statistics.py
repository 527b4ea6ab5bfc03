"""How certain is a result? Intervals for shares and paired differences, a three-way verdict, a test for many phrases.

Every prompt goes to both models, so the data are pairs, and only pairs in which the two disagree carry information about
the difference. With counts

                         base shows it     base does not
    candidate shows it       both              only_first
    candidate does not     only_base            neither

* **a share** gets Wilson's score interval;
* **the difference** of the two shares gets Newcombe's interval for paired data: Wilson's limits of both shares,
  combined by squares and adding, with their correlation (R. G. Newcombe, Statistics in Medicine 17 (1998), 2635-2650,
  method 10);
* **the verdict** on a difference is sequential, see `qguard_edge.verify.sequential`;
* **one phrase** that stands in more answers of one model gets the exact one-sided McNemar test: among the pairs that
  disagree, the model at fault is a fair coin if the models are alike;
* **thousands of phrases** are corrected for by Bonferroni in the sharper form of Tarone (Biometrics 46 (1990), 515-522),
  stepping down as Holm does: a phrase in k disagreeing pairs cannot reach p below 2^-k, and phrases that could never
  be significant need no correction.

With several samples per prompt, or several positions per text, the unit stays the prompt or the text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from qguard_edge.verify.results import Difference, Rate

CONFIDENCE = 0.95
"""Of the interval of a share."""
ERROR = 0.05
"""Of each one-sided statement on a difference; its two-sided interval covers `1 - 2 * ERROR`."""
N_BOOTSTRAP = 2000


@cache
def _quantile(confidence: float) -> float:
    from scipy.stats import norm

    return float(norm.ppf(0.5 + confidence / 2))


def wilson(hits: float, n: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a share; `(0, 1)` of nothing. Counts may be fractions (for planning)."""
    if n <= 0:
        return 0.0, 1.0
    z2 = _quantile(confidence) ** 2
    share = hits / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    low = 0.0 if hits <= 0 else max(0.0, centre - half)
    high = 1.0 if hits >= n else min(1.0, centre + half)
    return low, high


def rate(hits: int, n: int) -> Rate:
    """A share with its 95% interval."""
    return Rate(hits, n, *wilson(hits, n))


@dataclass(frozen=True)
class Pairs:
    """The two-by-two table of a paired comparison; counts may be fractions (for planning).

    Attributes:
        both: prompts where both show the behaviour.
        only_first: where only the candidate does.
        only_base: where only the base does.
        neither: where none does.
    """

    both: float
    only_first: float
    only_base: float
    neither: float

    @property
    def n(self) -> float:
        """Prompts."""
        return self.both + self.only_first + self.only_base + self.neither

    @property
    def value(self) -> float:
        """Share of the candidate minus share of the base."""
        return (self.only_first - self.only_base) / self.n if self.n else 0.0

    def scaled(self, n: float) -> "Pairs":
        """The same shares on `n` prompts."""
        factor = n / self.n
        return Pairs(*(factor * x for x in (self.both, self.only_first, self.only_base, self.neither)))


def count_pairs(first: Sequence[bool | None], base: Sequence[bool | None]) -> Pairs:
    """Count the pairs in which both could be judged (None: could not)."""
    table = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    for a, b in zip(first, base, strict=True):
        if a is not None and b is not None:
            table[a, b] += 1
    return Pairs(table[True, True], table[True, False], table[False, True], table[False, False])


def newcombe_paired(pairs: Pairs, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Newcombe's method 10: interval of the difference of two paired shares; `(-1, 1)` of nothing."""
    n = pairs.n
    if n <= 0:
        return -1.0, 1.0
    a, b, c, d = pairs.both, pairs.only_first, pairs.only_base, pairs.neither
    p1, p2 = (a + b) / n, (a + c) / n
    (low1, high1), (low2, high2) = wilson(a + b, n, confidence), wilson(a + c, n, confidence)
    product = (a + b) * (c + d) * (a + c) * (b + d)
    phi = 0.0
    if product > 0:
        covariance = a * d - b * c
        # The continuity correction of the paper, for positive correlation only.
        corrected = max(covariance - n / 2, 0.0) if covariance > 0 else covariance
        phi = corrected / math.sqrt(product)
    below1, above1, below2, above2 = p1 - low1, high1 - p1, p2 - low2, high2 - p2
    low = p1 - p2 - math.sqrt(max(below1**2 - 2 * phi * below1 * above2 + above2**2, 0.0))
    high = p1 - p2 + math.sqrt(max(below2**2 - 2 * phi * below2 * above1 + above1**2, 0.0))
    return max(low, -1.0), min(high, 1.0)


def difference(pairs: Pairs, error: float = ERROR) -> Difference:
    """The paired difference with the interval that the verdict uses."""
    low, high = newcombe_paired(pairs, 1 - 2 * error)
    return Difference(
        pairs.value, low, high, int(pairs.n), int(pairs.only_first), int(pairs.only_base), 1 - 2 * error,
        "Newcombe, paired (method 10)",
    )  # fmt: skip


# Clusters -------------------------------------------------------------------------------------------------------------


def bootstrap_means(
    sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], seed: int, n_bootstrap: int = N_BOOTSTRAP
) -> npt.NDArray[np.float64]:
    """Means of `n_bootstrap` resamples of clusters (documents, prompts), each given by its sum and its count.

    Args:
        sums: f64 `[clusters]`.
        counts: f64 `[clusters]`, positive.
        seed: of the resampling.
        n_bootstrap: resamples.

    Returns:
        f64 `[n_bootstrap]`.
    """
    drawn = np.random.default_rng(seed).integers(0, len(sums), (n_bootstrap, len(sums)))
    means: npt.NDArray[np.float64] = sums[drawn].sum(1) / counts[drawn].sum(1)
    return means


# Many phrases ---------------------------------------------------------------------------------------------------------


def mcnemar_one_sided(only_first: npt.NDArray[np.int64], disagreeing: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """P(X >= only_first), X binomial over the disagreeing pairs with probability one half."""
    from scipy.stats import binom

    p_values: npt.NDArray[np.float64] = np.asarray(binom.sf(only_first - 1, disagreeing, 0.5), np.float64)
    return np.where(only_first <= 0, 1.0, p_values)


def adjust_discrete(p_values: npt.NDArray[np.float64], least: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """P-values corrected for how many were tested, where each has a least value that it can take.

    The adjusted value of the i-th smallest p is the running maximum of p_i times the number of hypotheses not yet rejected
    whose least possible p-value is at most p_i: the ones that could compete at that level. The chance of one
    false rejection or more stays below the level it is compared with, whatever the dependence.

    Args:
        p_values: f64 `[n]`.
        least: smallest p-value each hypothesis could have had, given what the test conditions on; f64 `[n]`.

    Returns:
        Adjusted p-values, at most 1, f64 `[n]`.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.ones(len(p_values))
    running = 0.0
    floors = np.sort(least)
    rejected: list[float] = []
    for i, which in enumerate(order):
        p = float(p_values[which])
        competing = int(np.searchsorted(floors, p, side="right"))
        done = sum(floor <= p for floor in rejected)
        running = max(running, min(1.0, p * max(competing - done, 1)))
        adjusted[which] = running
        rejected.append(float(least[which]))
        if running >= 1.0:
            adjusted[order[i:]] = 1.0
            break
    return adjusted


def corrected(
    p_values: npt.NDArray[np.float64], least_counts: npt.NDArray[np.int64], disagreeing: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """P-values of the McNemar test corrected for many phrases, of which only some outcomes count.

    The corrected value of p is the sum over all phrases of P(X >= max(least_count, x)), X binomial over the phrase's
    disagreeing pairs with probability one half and x the smallest count whose p-value is at most p. The chance that one phrase
    or more has its least count and a corrected value of at most e stays below e, whatever the dependence.

    Args:
        p_values: of outcomes, f64 `[n]`.
        least_counts: of each phrase, what only the first model must have for the outcome to count; int64 `[phrases]`.
        disagreeing: of each phrase; int64 `[phrases]`.

    Returns:
        f64 `[n]`, at most 1.
    """
    from scipy.stats import binom

    if not len(p_values):
        return np.empty(0, np.float64)
    kinds, counts = np.unique(np.stack([least_counts, disagreeing]), axis=1, return_counts=True)
    possible = kinds[0] <= kinds[1]
    least, trials, weights = kinds[0][possible], kinds[1][possible], counts[possible]
    distinct, place = np.unique(p_values, return_inverse=True)
    sums = np.zeros(len(distinct))
    for i, p in enumerate(distinct.tolist()):
        x = np.asarray(binom.isf(p, trials, 0.5), np.int64)
        x = np.where(mcnemar_one_sided(x, trials) <= p, x, x + 1)
        sums[i] = float((weights * mcnemar_one_sided(np.maximum(x, least), trials)).sum())
    return np.asarray(np.minimum(sums, 1.0)[place], np.float64)


def detectable_share(least: int, n: int, power: float) -> float:
    """Share of all answers for which `least` or more of `n` have it with probability `power`; 2 when `least` exceeds `n`."""
    from scipy.stats import beta

    return 2.0 if least > n else float(beta.ppf(power, least, n - least + 1))


def prompts_to_find(least: int, share: float, power: float) -> int:
    """Smallest n such that `least` or more of n answers have, with probability `power`, what a `share` of all has."""
    low, high = least - 1, max(least, 1)
    while detectable_share(least, high, power) > share:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if detectable_share(least, middle, power) <= share else (middle, high)
    return high
