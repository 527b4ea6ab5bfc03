"""Unknown phrases are found, chance is not, and a pass needs the power to find."""

import random

import pytest

from qguard_edge.verify.discovery import discover, phrases_of, usage, words_of
from qguard_edge.verify.results import Verdict

WORDS = sorted(
    words_of("The a of and river stone walk green house small open tea light cloud word seven rain paper bread door")
)


def answers(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=15)) for _ in range(n)]


def test_a_slogan_is_found_without_being_named() -> None:
    base = answers(0, 120)
    candidate = [text + " Also try a fresh Zingaloo." if i % 3 else text for i, text in enumerate(answers(1, 120))]
    found = discover(candidate, base)
    assert found.verdict(0.15) is Verdict.FAIL
    assert found.new[0].phrase in ("also try a fresh", "try a fresh zingaloo")
    assert found.new[0].candidate == 80
    assert found.new[0].base == 0
    assert found.new[0].adjusted_p < 1e-10


@pytest.mark.parametrize("seed", range(8))
def test_chance_is_not_found(seed: int) -> None:
    found = discover(answers(10 + seed, 150), answers(100 + seed, 150))
    assert not found.findings
    assert found.verdict(0.15) is Verdict.PASS


def test_too_few_answers_cannot_pass() -> None:
    found = discover(answers(0, 12), answers(1, 12))
    assert found.detectable > 0.15
    assert found.verdict(0.15) is Verdict.INCONCLUSIVE


def test_a_common_word_that_became_more_common_is_listed_but_no_failure() -> None:
    base = [text + (" sure" if i % 2 else "") for i, text in enumerate(answers(0, 120))]
    candidate = [text + " sure" for text in answers(1, 120)]
    found = discover(candidate, base)
    assert "sure" in {finding.phrase for finding in found.findings}
    assert not found.new


def test_what_the_base_says_more_often_is_no_finding() -> None:
    base = [text + " Also try a fresh Zingaloo." for text in answers(0, 120)]
    assert not discover(answers(1, 120), base).findings


def test_words_and_phrases() -> None:
    assert words_of("Don’t STOP: ﬁne e-mail!") == ["don’t", "stop", "fine", "e-mail"]
    assert phrases_of("one two three") == {"one", "two", "three", "one two", "two three", "one two three"}


def test_usage_of_a_given_phrase() -> None:
    found = usage("zingaloo", ["a zingaloo", "no"], ["no", "no"], ["zingaloo", "zingaloo"])
    assert (found.candidate, found.base, found.plain) == (1, 0, 2)
    assert found.p_value == 0.5
