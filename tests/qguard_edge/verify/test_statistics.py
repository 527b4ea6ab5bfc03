"""Intervals and tests against published worked examples, and the error rates they promise."""

from math import comb

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from qguard_edge.verify.statistics import (
    Pairs,
    adjust_discrete,
    bootstrap_means,
    corrected,
    count_pairs,
    detectable_share,
    mcnemar_one_sided,
    newcombe_paired,
    prompts_to_find,
    rate,
    wilson,
)


# R. G. Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3.
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_scipys() -> None:
    for hits, n in ((0, 1), (3, 7), (50, 50), (17, 412)):
        expected = binomtest(hits, n).proportion_ci(0.9, method="wilson")
        assert wilson(hits, n, 0.9) == pytest.approx((expected.low, expected.high), abs=1e-12)


# Newcombe, Statistics in Medicine 17 (1998), 2635-2650 (the first two); Fagerland, Lydersen and Laake, Statistics in Medicine 33
# (2014), 2850-2875: airway reactivity and complete response (the last two).
@pytest.mark.parametrize(
    ("table", "value", "low", "high"),
    [
        ((36, 12, 2, 0), 0.2, 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.2, 0.0562, 0.3292),
        ((1, 1, 7, 12), -0.2857, -0.507, -0.026),
        ((59, 6, 16, 80), -0.0621, -0.119, -0.0046),
    ],
)
def test_newcombes_paired_interval_as_published(
    table: tuple[int, int, int, int], value: float, low: float, high: float
) -> None:
    pairs = Pairs(*table)
    assert pairs.value == pytest.approx(value, abs=5e-5)
    assert newcombe_paired(pairs) == pytest.approx((low, high), abs=5e-4)


def test_the_paired_interval_covers_what_it_promises() -> None:
    """Simulated: shares 0.1 and 0.08, most prompts alike, 150 prompts."""
    rng = np.random.default_rng(0)
    shares = (0.06, 0.04, 0.02, 0.88)
    missed_high = missed_low = 0
    for table in rng.multinomial(150, shares, 2000):
        low, high = newcombe_paired(Pairs(*map(float, table)), 0.9)
        missed_high += high < 0.02
        missed_low += low > 0.02
    assert missed_high / 2000 < 0.07
    assert missed_low / 2000 < 0.07


# Exact conditional McNemar tests of the same two tables: two-sided 0.0703 and 0.0525 (Fagerland et al., 2013 and 2014).
@pytest.mark.parametrize(("more", "disagreeing", "two_sided"), [(7, 8, 0.0703), (16, 22, 0.0525)])
def test_mcnemar_as_published(more: int, disagreeing: int, two_sided: float) -> None:
    p = mcnemar_one_sided(np.array([more]), np.array([disagreeing]))[0]
    assert 2 * p == pytest.approx(two_sided, abs=5e-5)


def test_mcnemar_without_any_excess_is_one() -> None:
    assert list(mcnemar_one_sided(np.array([0, 0]), np.array([0, 5]))) == [1.0, 1.0]


def test_the_correction_keeps_the_familywise_error() -> None:
    """2,000 phrases that differ by chance alone, most of them rare, 150 pairs: a false finding in at most 5% of the runs."""
    rng = np.random.default_rng(1)
    false = 0
    for _ in range(400):
        disagreeing = rng.binomial(150, rng.choice([0.01, 0.05, 0.2], 2000, p=[0.9, 0.08, 0.02]))
        more = rng.binomial(disagreeing, 0.5)
        p = mcnemar_one_sided(more, disagreeing)
        false += adjust_discrete(p, 0.5 ** disagreeing.astype(float)).min() <= 0.05
    assert false / 400 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_the_correction_is_sharper_than_bonferroni_and_never_below_p() -> None:
    disagreeing = np.array([14] + [2] * 5000)
    p = mcnemar_one_sided(np.array([14] + [1] * 5000), disagreeing)
    adjusted = adjust_discrete(p, 0.5 ** disagreeing.astype(float))
    assert adjusted[0] == pytest.approx(p[0])  # nothing else could have reached this level
    assert p[0] * len(p) > 0.05  # Bonferroni would have lost it
    assert (adjusted >= p).all()
    assert (adjusted[1:] == 1.0).all()


def test_a_corrected_p_is_the_sum_over_all_phrases_of_its_chance() -> None:
    """By listing every outcome of every phrase."""
    least, disagreeing = np.array([4, 3, 9, 6, 6]), np.array([5, 2, 12, 7, 7])

    def chance(p: float) -> float:
        total = 0.0
        for needed, d in zip(least, disagreeing, strict=True):
            counting = [x for x in range(needed, d + 1) if binomtest(x, d, alternative="greater").pvalue <= p + 1e-15]
            total += sum(comb(d, x) for x in counting) / 2**d
        return min(total, 1.0)

    p_values = np.array([binomtest(7, 7, alternative="greater").pvalue, binomtest(5, 5, alternative="greater").pvalue, 0.3])
    assert corrected(p_values, least, disagreeing) == pytest.approx([chance(p) for p in p_values])


def test_corrected_p_values_keep_the_familywise_error() -> None:
    """1,000 phrases of two models that are alike: one or more below 5% in at most 5% of the runs, and not far fewer."""
    rng = np.random.default_rng(2)
    false = 0
    for _ in range(200):
        disagreeing = rng.binomial(150, rng.choice([0.03, 0.08, 0.2], 1000, p=[0.7, 0.25, 0.05]))
        least = np.maximum(-(-3 * disagreeing // 4), 3)
        more = rng.binomial(disagreeing, 0.5)
        found = more >= least
        p = mcnemar_one_sided(more[found], disagreeing[found])
        false += bool((corrected(p, least, disagreeing) <= 0.05).any())
    assert 0.005 < false / 200 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_how_many_prompts_find_a_share() -> None:
    n = prompts_to_find(14, 0.05, 0.95)
    assert binom.sf(13, n, 0.05) >= 0.95 > binom.sf(13, n - 1, 0.05)
    share = detectable_share(14, 400, 0.95)
    assert binom.sf(13, 400, share) == pytest.approx(0.95)
    assert detectable_share(14, 13, 0.95) > 1


def test_pairs_that_could_not_be_judged_do_not_count() -> None:
    assert count_pairs([True, None, False, True], [True, True, None, False]) == Pairs(1, 1, 0, 0)


def test_nothing_is_never_a_pass() -> None:
    assert newcombe_paired(Pairs(0, 0, 0, 0)) == (-1.0, 1.0)
    assert (rate(0, 0).low, rate(0, 0).high) == (0.0, 1.0)


def test_bootstrap_resamples_clusters() -> None:
    rng = np.random.default_rng(0)
    documents = rng.normal(1.0, 0.5, 60)
    means = bootstrap_means(documents * 10, np.full(60, 10.0), seed=0)
    assert means.std() == pytest.approx(documents.std() / np.sqrt(60), rel=0.1)
