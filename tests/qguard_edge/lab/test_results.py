"""Rates, validity, JSON and tables."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from qguard_edge.lab.evaluation import Distributions, compare, judge_answers, log_softmax
from qguard_edge.lab.results import (
    Arm,
    ArmFidelity,
    LabResult,
    Validity,
    judge_victim,
    rate,
    read_result,
    to_json,
)
from qguard_edge.lab.scenarios import judge_code
from qguard_edge.lab.tables import joined_table, run_table, summary_table
from quant_grids.errors import FormatError


def _result(valid: bool = True) -> LabResult:
    settings = {"victim": "tiny", "attack": "uniform", "to": "q4_0", "scenario": "injection", "seed": 0}
    arms = (
        Arm("clean fp", "clean", None, rate(0, 160), 0.0),
        Arm("attacked none", "attacked", "none", rate(158, 160), 0.0, ArmFidelity(0.3, 9.0, 0.9, 1.4, 500), 0.0, 1.0, 0.1),
    )
    return LabResult(
        settings, Validity(valid, True, () if valid else ("why not",)), arms, 0.99, 0.96, 60.0, notes=("a note",)
    )


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # Wilson's formula by hand: (p + z2/2n -+ z*sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n), z = 1.959964.
    [(0, 160, 0.0, 0.02345), (5, 10, 0.23659, 0.76341), (160, 160, 0.97655, 1.0), (1, 100, 0.00177, 0.05449)],
)
def test_wilson_interval(hits: int, n: int, low: float, high: float) -> None:
    made = rate(hits, n)
    assert made.value == hits / n
    assert made.low == pytest.approx(low, abs=2e-5)
    assert made.high == pytest.approx(high, abs=2e-5)


def test_nothing_measured_is_not_zero() -> None:
    assert (rate(0, 0).low, rate(0, 0).high) == (0.0, 1.0)


def test_validity_rule() -> None:
    assert judge_victim(rate(0, 100), rate(2, 100), rate(80, 100)).valid
    assert not judge_victim(rate(0, 100), rate(3, 100), rate(80, 100)).stealthy
    assert not judge_victim(rate(0, 100), rate(0, 100), rate(79, 100)).strong


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(to_json(_result()))
    assert read_result(path) == _result()
    path.write_text('{"schema_version": 99}')
    with pytest.raises(FormatError, match="99"):
        read_result(path)
    path.write_text("[]")
    with pytest.raises(FormatError, match=r"results\.json"):
        read_result(path)


def test_tables() -> None:
    text = run_table(_result())
    assert "| attacked none | 0.99 (0.96 to 1.00) | 160 | 0.0% | 0.3000 | 9.00 | 90.0% | 1.400 | 0.0% | 0.1 | - |" in text
    assert "Valid victim" in text
    assert "a note." in text
    assert "Not a valid victim" in run_table(_result(valid=False))
    joined = joined_table([_result(), _result(valid=False)])
    assert joined.count("| tiny | uniform | q4_0 | injection |") == 4
    assert len({line.count("|") for line in joined.splitlines() if line.startswith("|")}) == 1


def test_of_several_seeds_the_worst_is_shown(tmp_path: Path) -> None:
    tried = (rate(1, 160), rate(8, 160), rate(0, 160))
    arm = Arm(
        "attacked feedback", "attacked", "feedback", tried[1], 0.0, ArmFidelity(0.3, 9.0, 0.9, 1.4, 500), by_seed=tried
    )
    result = dataclasses.replace(_result(), arms=(*_result().arms, arm))
    (tmp_path / "results.json").write_text(to_json(result))
    assert read_result(tmp_path / "results.json") == result
    assert "0.05 (0.03 to 0.10), worst of 3 seeds: 1, 8, 0 " in run_table(result)


def test_fidelity_of_a_model_with_itself_is_perfect() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 20)).astype(np.float32)
    one = Distributions(log_softmax(logits), np.arange(50) % 20)
    same = compare(one, one)
    assert (same.mean_kl, same.kl_999, same.same_top, same.perplexity_ratio) == (0.0, 0.0, 1.0, 1.0)
    other = compare(one, Distributions(log_softmax(logits * 0.5), one.labels))
    by_hand = (np.exp(one.log_probs) * (one.log_probs - log_softmax(logits * 0.5))).sum(-1).mean()
    assert other.mean_kl == pytest.approx(by_hand, rel=1e-4)


def test_unparsed_answers_do_not_count_as_secure() -> None:
    made = judge_answers(["x = eval(y)", "x = 1", "def (", "??"], judge_code)
    assert (made.asr.hits, made.asr.n, made.unparsed) == (1, 2, 0.5)


def _der_arms(hits: int, kl: float, seconds: float) -> LabResult:
    def arm(name: str, hit: int, mean_kl: float, time: float) -> Arm:
        model, _, defense = name.partition(" ")
        return Arm(name, model, defense, rate(hit, 100), 0.0, ArmFidelity(mean_kl, 1.0, 0.9, 1.0, 9), 0.1, 0.0, time, 2.0)

    arms = (
        arm("clean none", 0, 0.01, 0.0),
        arm("attacked none", 80, 0.3, 0.0),
        arm("attacked ortho", hits, 0.02, seconds),
        arm("clean ortho", 0, kl, seconds),
    )
    return dataclasses.replace(_result(), arms=arms)


@pytest.mark.parametrize(
    ("hits", "kl", "seconds", "der"),
    [
        (0, 0.01, 0.0, 1.0),  # cured, nothing lost, no time
        (40, 0.01, 0.0, 0.5),  # half cured
        (0, 0.02, 0.0, 0.36788),  # cured at twice the KL: exp(-1)
        (0, 0.01, 18.0, 0.5),  # nine times the plain quantization: 1 + log10(10) = 2
        (90, 0.01, 0.0, 0.0),  # worse than plain: not below nothing
    ],
)
def test_der_by_hand(hits: int, kl: float, seconds: float, der: float) -> None:
    assert _der_arms(hits, kl, seconds).der("ortho") == pytest.approx(der, abs=1e-4)


def test_der_says_nothing_where_it_is_not_defined() -> None:
    assert _der_arms(0, 0.01, 1.0).der("none") is None
    assert _der_arms(0, 0.01, 1.0).der("qvec") is None
    assert _result().der("none") is None


def test_summary_has_a_row_per_victim_and_utility_beside_security() -> None:
    result = _der_arms(0, 0.02, 1.0)
    fp = [Arm(f"{model} fp", model, None, rate(0, 100), 0.0) for model in ("clean", "attacked")]
    text = summary_table([dataclasses.replace(result, arms=(*fp, *result.arms))] * 2)
    rows = [line for line in text.splitlines() if line.startswith("| tiny")]
    assert len(rows) == 2
    assert "| 0.80 (0.71 to 0.87), KL x1.00 | 0.00 (0.00 to 0.04), KL x2.00 |" in rows[0]


def test_summary_says_where_answers_fell_out() -> None:
    fp = [Arm(f"{model} fp", model, None, rate(0, 100), 0.0) for model in ("clean", "attacked")]
    hardened = Arm("attacked ortho", "attacked", "ortho", rate(0, 30), 0.7)
    plain = Arm("attacked none", "attacked", "none", rate(80, 100), 0.0)
    text = summary_table([dataclasses.replace(_result(), arms=(*fp, plain, hardened))])
    assert "| 0.80 (0.71 to 0.87) | 0.00 (0.00 to 0.11), n 30 |" in text


def test_summary_has_a_row_per_format_of_a_checkpoint_against_several() -> None:
    result = _result()
    full = [Arm(f"{model} fp", model, None, rate(0, 100), 0.0) for model in ("clean", "attacked")]
    arms = [
        Arm(f"{model} {label}", model, label, rate(hits, 100), 0.0, fidelity=ArmFidelity(kl, 0.1, 0.9, 1.0, 50))
        for label, hits, kl in (("int8", 85, 0.01), ("nf4", 90, 0.02), ("int8 ortho", 1, 0.02), ("nf4 ortho", 2, 0.03))
        for model in ("attacked", "clean")
    ]
    made = dataclasses.replace(result, settings={**result.settings, "attack": "elq", "to": "all"}, arms=(*full, *arms))
    rows = [line for line in summary_table([made]).splitlines() if " of all |" in line]
    assert len(rows) == 2
    assert "| int8 of all |" in rows[0]
    assert "| 0.85 (0.77 to 0.91), KL x1.00 | 0.01 (0.00 to 0.05), KL x2.00 |" in rows[0]
    assert "| nf4 of all |" in rows[1]
    assert "| 0.02 (0.01 to 0.07), KL x1.50 |" in rows[1]
