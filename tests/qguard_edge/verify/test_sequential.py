"""The promises of the sequential tests, held against simulated runs.

Each row of an array is a run of its own: 2,000 of them look at the schedule that `verify` has. A simulation of that size has a
standard error of 0.5 points at 5%; no scenario may lie more than three of them above a promise, and the mean of all not at all.
"""

import numpy as np
import pytest
from scipy.stats import binom, multinomial, norm

from qguard_edge.verify.checks import KIND_MARGINS, Margins
from qguard_edge.verify.results import CheckKind, Verdict
from qguard_edge.verify.sequential import (
    PASS_ERROR,
    Rules,
    count_distance,
    critical_values,
    decide,
    distance,
    pairs_needed,
    score_distance,
)
from qguard_edge.verify.suites.files import BUILT_IN, built_in
from tests.helpers.simulated_runs import RUNS, counts, failed_at, graded, passed_at

LOOKS = (32, 64, 100, 150, 200, 300, 450, 675, 1000)

MARGINS = [
    (0.02, (0.02, 0.025, 0.04, 0.1, 0.3), LOOKS),
    (0.05, (0.05, 0.1, 0.2), LOOKS[:7]),
    (0.1, (0.1, 0.15, 0.3), LOOKS[:6]),
    (0.15, (0.15, 0.25, 0.5), LOOKS[:6]),
]
OWN = {KIND_MARGINS[CheckKind.SECURITY], *(Margins().of(one) for name in BUILT_IN for one in built_in(name).matchers)}


def test_every_margin_that_a_check_has_by_default_is_simulated() -> None:
    assert {margin for margin, _, _ in MARGINS} == OWN


def test_false_passes_at_the_margin_are_at_most_five_in_a_hundred() -> None:
    shares = []
    for margin, disagreements, looks in MARGINS:
        for i, q in enumerate(disagreements):
            z = counts((q + margin) / 2, (q - margin) / 2, looks[-1], seed=i)
            shares.append((passed_at(z, margin, looks) > 0).mean())
    for kind in ("quiet", "noisy", "jumps up", "jumps down"):
        z = graded(kind, 0.02, 450)
        shares.append((passed_at(z, 0.02, LOOKS[:7]) > 0).mean())
    allowed = PASS_ERROR + 3 * np.sqrt(PASS_ERROR * (1 - PASS_ERROR) / RUNS)
    assert max(shares) <= allowed, shares
    assert np.mean(shares) <= PASS_ERROR, shares
    # And not because nothing ever passes: where the normal approximation is good, most of the error is used.
    assert max(shares) >= 0.03, shares


def test_the_last_look_may_spend_what_is_left() -> None:
    shares = []
    for i, q in enumerate((0.02, 0.03, 0.06, 0.2)):
        z = counts((q + 0.02) / 2, (q - 0.02) / 2, 153, seed=10 + i)
        shares.append((passed_at(z, 0.02, (32, 64, 100, 153), last=True) > 0).mean())
    assert max(shares) <= PASS_ERROR + 3 * np.sqrt(PASS_ERROR * (1 - PASS_ERROR) / RUNS), shares


def test_equal_models_fail_in_one_run_of_a_hundred_at_most() -> None:
    """With all of the 1% given to one check, and looked at after every prompt; a check of a run gets a part of it."""
    rules, failed = Rules(0.02, 0.01), []
    for i, q in enumerate((0.0, 0.02, 0.1, 0.3, 0.8)):
        failed.append((failed_at(counts(q / 2, q / 2, 500, seed=20 + i), rules) > 0).mean())
    kinds = ("quiet", "noisy", "jumps up", "jumps down")
    failed += [(failed_at(graded(kind, 0.0, 500), rules) > 0).mean() for kind in kinds]
    assert max(failed) <= 0.01, failed
    # The promise holds up to the margin, not only for equal models.
    for i, q in enumerate((0.02, 0.1, 0.3)):
        z = counts((q + 0.02) / 2, (q - 0.02) / 2, 500, seed=30 + i)
        assert (failed_at(z, rules) > 0).mean() <= 0.01 + 3 * np.sqrt(0.01 * 0.99 / RUNS)


@pytest.mark.parametrize(("success", "noise", "within"), [(0.2, 0.0, 130), (0.2, 0.1, 260), (0.5, 0.1, 60), (1.0, 0.1, 25)])
def test_an_attack_fails_soon_and_hardly_ever_passes(success: float, noise: float, within: int) -> None:
    """`success`: share of prompts whose answer the attack takes over; on the others the models disagree in a share `noise`."""
    more, less = success + (1 - success) * noise / 2, (1 - success) * noise / 2
    z = counts(more, less, 400, seed=40)
    failed, passed = failed_at(z, Rules(0.02, 0.01 / 12)), passed_at(z, 0.02, LOOKS[:5])
    assert np.quantile(np.where(failed == 0, 10_000, failed), 0.95) <= within
    assert (failed > 0).mean() >= 0.99
    assert (passed > 0).mean() <= 0.001


@pytest.mark.parametrize("margin", sorted(OWN))
def test_an_attack_of_a_fifth_does_not_pass_at_any_check_s_own_margin(margin: float) -> None:
    for noise in (0.0, 0.1, 0.3):
        z = counts(0.2 + 0.8 * noise / 2, 0.8 * noise / 2, LOOKS[6], seed=50)
        assert (passed_at(z, margin, LOOKS[:7]) > 0).mean() <= 0.01
    equal = passed_at(counts(0.04, 0.04, LOOKS[6], seed=51), margin, LOOKS[:7])
    assert (equal > 0).mean() >= (0.15 if margin == 0.02 else 0.85)


def test_honest_models_pass_and_a_behaviour_that_nobody_shows_passes_at_200() -> None:
    nothing = np.zeros(200)
    assert decide(nothing[:150], (32, 64, 100, 150), Rules(0.02, 0.001)).verdict is Verdict.INCONCLUSIVE
    found = decide(nothing, LOOKS[:5], Rules(0.02, 0.001))
    assert (found.verdict, found.decided_at) == (Verdict.PASS, 200)
    assert found.high <= 0.02 < decide(nothing[:150], LOOKS[:4], Rules(0.02, 0.001)).high
    assert (passed_at(counts(0.01, 0.01, 1000), 0.02, LOOKS) > 0).mean() >= 0.95
    # Graded scores of honest models vary little, and need hardly more prompts than a behaviour that is never seen.
    quiet = passed_at(graded("quiet", 0.0, 450), 0.02, LOOKS[:7])
    assert ((quiet > 0) & (quiet <= 300)).mean() >= 0.7
    assert (quiet > 0).mean() >= 0.95


def test_a_p_value_of_counts_is_the_probability_summed_over_all_tables() -> None:
    """Against the definition: all (more, less) of 40 prompts with a difference no larger, under the likeliest rates."""
    n, more, less, margin = 40, 2, 5, 0.1
    rates = np.linspace(1e-6, 0.45 - 1e-6, 20_001)
    likelihood = more * np.log(rates + margin) + less * np.log(rates) + (n - more - less) * np.log(1 - margin - 2 * rates)
    base = rates[likelihood.argmax()]
    tables = [(x, y) for x in range(n + 1) for y in range(n + 1 - x) if x - y <= more - less]
    rows = np.array([(x, y, n - x - y) for x, y in tables])
    expected = multinomial.pmf(rows, n, [base + margin, base, 1 - margin - 2 * base]).sum()
    found = count_distance(np.array([more]), np.array([less]), n, margin)[0]
    assert norm.sf(found) == pytest.approx(expected, rel=1e-3)
    unseen = count_distance(np.array([0]), np.array([0]), 150, 0.02)[0]
    assert norm.sf(unseen) == pytest.approx(binom.pmf(0, 150, 0.02))


def test_counts_given_as_scores_give_nearly_the_same() -> None:
    z = np.repeat([1.0, -1.0, 0.0], [12, 20, 468])
    scores = float(score_distance(z[None], 0.02)[0])
    assert scores == pytest.approx(distance(z, 0.02), abs=0.1)
    assert decide(z, (500,), Rules(0.02, 0.001)).high == pytest.approx(
        decide(z + 1e-9, (500,), Rules(0.02, 0.001)).high, abs=2e-3
    )


def test_critical_values_spend_what_they_should() -> None:
    """Against random walks: the share of null paths that cross at any look is what was to be spent."""
    looks = (100, 200, 300, 450, 675, 1000, 1500, 2250)
    steps = np.random.default_rng(0).standard_normal((200_000, len(looks))) * np.sqrt(np.diff([0, *looks]))
    paths = steps.cumsum(1) / np.sqrt(looks)
    crossed = (paths >= critical_values(looks, 0.02)).any(1).mean()
    assert crossed == pytest.approx(0.0467, abs=0.0015)
    assert critical_values((100,), 0.02, True)[0] == pytest.approx(norm.isf(0.0475), abs=0.01)


def test_scores_of_another_range_are_scaled() -> None:
    z = np.random.default_rng(1).normal(0.0, 0.1, 400)
    one, ten = decide(z, (200, 400), Rules(0.02, 0.001)), decide(10 * z, (200, 400), Rules(0.2, 0.001, bound=10.0))
    assert ten.verdict is one.verdict
    assert (ten.low, ten.high) == pytest.approx((10 * one.low, 10 * one.high))


def test_an_outcome_agrees_with_its_bounds() -> None:
    rules = Rules(0.02, 0.001)
    for seed, (more, less) in enumerate(((0.0, 0.0), (0.1, 0.1), (0.3, 0.02), (0.02, 0.3), (1.0, 0.0))):
        z = counts(more, less, 450, seed)[0]
        found = decide(z, LOOKS[:7], rules)
        assert found.low <= found.value <= found.high or found.verdict is Verdict.PASS
        assert (found.verdict is Verdict.PASS) == (found.high <= rules.margin)
        assert (found.verdict is Verdict.FAIL) == (found.low > rules.margin)
    assert decide([], (), rules).verdict is Verdict.INCONCLUSIVE


def test_a_fail_stands_whatever_comes_later() -> None:
    z = np.concatenate([np.ones(60), np.zeros(3000)])
    assert decide(z, (60, 500, 3060), Rules(0.02, 0.001)).verdict is Verdict.FAIL


def test_samples_of_one_prompt_are_not_independent_prompts() -> None:
    """10 prompts sampled 100 times are still 10 prompts: what is tested is one share per prompt."""
    spread = decide(np.array([0.5] * 5 + [-0.5] * 5), (10,), Rules(0.02, 0.001))
    assert spread.low < -0.1
    assert spread.high > 0.1


def test_how_many_pairs_it_would_take() -> None:
    rules = Rules(0.02, 0.001)
    assert 195 <= (pairs_needed(0.0, 0.0, rules) or 0) <= 220
    honest = pairs_needed(0.0, 0.1, rules)
    assert honest is not None
    assert (passed_at(counts(0.05, 0.05, honest, 3), 0.02, (200, 300, 450, 675, 1000, honest)) > 0).mean() > 0.4
    attack = pairs_needed(0.2, 0.16, rules)
    assert attack is not None
    assert 40 <= attack <= 130
    assert pairs_needed(0.02, 0.1, rules) is None
