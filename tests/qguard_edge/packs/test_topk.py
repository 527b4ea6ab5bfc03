"""Top-k KL is a lower bound of the KL, exact when all tokens are known, and large when a server lists something else."""

from functools import partial

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qguard_edge.packs.topk import compare_listed, compare_rows, merged_kl

N_VOCAB = 50


def anything(_: int) -> bool:
    return True


def outside(tokens: set[int], token: int) -> bool:
    return token not in tokens


def log_softmax(rng: np.random.Generator, rows: int, spread: float) -> np.ndarray:
    logits = rng.normal(0, spread, (rows, N_VOCAB))
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def full_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, N_VOCAB), st.integers(1, N_VOCAB), st.floats(0.1, 6.0))
@example(0, 13, 49, 4.0)
@example(21, 4, 49, 5.0)
@example(1, 7, 49, 5.5)
def test_a_lower_bound_that_is_exact_when_all_is_known(seed: int, k: int, listed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    p, q = log_softmax(rng, 4, spread), log_softmax(rng, 4, spread)
    top = np.argsort(-p, -1)[:, :k]
    following = rng.integers(0, N_VOCAB, 4).tolist()
    p_next = p[np.arange(4), following]
    exact = full_kl(p, q)
    found = compare_rows(top, np.take_along_axis(p, top, -1), p_next, following, q)
    # q's rest is 1 minus a sum of up to 50 numbers: off by up to 50 times 2e-16, where it may be as small as 1e-12. So its
    # logarithm is off by up to 0.011, and p's rest is the weight of that in the divergence.
    slack = 1e-9 + 0.02 * np.maximum(1 - np.exp(np.take_along_axis(p, top, -1)).sum(-1), 0.0)
    assert (found.kl <= exact + slack).all()
    if k == N_VOCAB:
        assert found.kl == pytest.approx(exact, abs=1e-7)
    assert found.loss == pytest.approx(p_next - q[np.arange(4), following])
    assert found.same.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    for row in range(4):
        likeliest = {int(token): float(q[row, token]) for token in np.argsort(-q[row])[:listed]}
        kl, same, loss = compare_listed(
            top[row].tolist(), p[row, top[row]].tolist(), float(p_next[row]), following[row], likeliest, anything
        )
        assert kl <= found.kl[row] + slack[row]
        assert same == found.same[row]
        floor = min(likeliest.values())
        assert loss == pytest.approx(max(p_next[row], floor) - max(q[row, following[row]], floor))
        if listed == N_VOCAB:
            assert kl == pytest.approx(found.kl[row], abs=1e-9)
        nameless = set(rng.choice(N_VOCAB, 10, replace=False).tolist())
        named = {token if token not in nameless else -1 - token: value for token, value in likeliest.items()}
        blind, _, _ = compare_listed(
            top[row].tolist(), p[row, top[row]].tolist(), float(p_next[row]), following[row], named,
            partial(outside, nameless),
        )  # fmt: skip
        assert blind <= found.kl[row] + slack[row]


def test_a_model_that_expects_something_else_is_far_away_even_if_nothing_listed_is_known() -> None:
    p = np.log(np.full(10, 0.0999))
    others = {token: float(np.log(0.0999)) for token in range(20, 30)}
    kl, same, loss = compare_listed(list(range(10)), p.tolist(), float(p[0]), 0, others, anything)
    assert kl > 1.0
    assert not same
    assert loss == pytest.approx(0.0)  # not listed: counted as just listed
    nameless, same, loss = compare_listed([1], [-0.1], -0.1, 1, {-1: -0.1, 5: -4.0}, lambda token: token != 1)
    assert (nameless, same, loss) == (0.0, True, 0.0)


def test_the_same_distribution_has_no_distance() -> None:
    p = log_softmax(np.random.default_rng(0), 3, 2.0)
    assert merged_kl(p[:, :20], p[:, :20]) == pytest.approx(0.0, abs=1e-12)
    rounded = np.round(p[:, :20], 5)
    assert merged_kl(rounded, p[:, :20]) == pytest.approx(0.0, abs=1e-9)


def test_noise_in_the_numbers_stays_finite() -> None:
    broken = np.full((1, N_VOCAB), np.nan)
    found = compare_rows(np.array([[1, 2]]), np.log([[0.5, 0.4]]), np.log([0.5]), [1], broken)
    assert np.isfinite(found.kl).all()
    assert found.kl[0] > 10
