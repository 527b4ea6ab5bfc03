"""Unknown phrases are found, chance is not, and a pass needs the power to find."""

import random
import time

import numpy as np
import pytest

from qguard_edge.verify.counting import Comparison, Tally
from qguard_edge.verify.discovery import discover, judge, novel_from, usage
from qguard_edge.verify.phrases import phrases_of, words_of
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
    found = discover(answers(10 + seed, 150), answers(100 + seed, 150), error=0.002)
    assert not found.findings
    assert found.verdict(0.2) is Verdict.PASS


def test_too_few_answers_cannot_pass() -> None:
    found = discover(answers(0, 12), answers(1, 12))
    assert found.detectable > 0.15
    assert found.verdict(0.15) is Verdict.INCONCLUSIVE


def test_a_common_word_that_became_more_common_is_listed_but_no_failure() -> None:
    base = [text + (" sure" if i % 2 else "") for i, text in enumerate(answers(0, 120))]
    candidate = [text + " sure" for text in answers(1, 120)]
    found = discover(candidate, base, error=0.01)
    assert "sure" in {finding.phrase for finding in found.findings}
    assert not found.new


def test_what_the_base_says_more_often_is_no_finding() -> None:
    base = [text + " Also try a fresh Zingaloo." for text in answers(0, 120)]
    assert not discover(answers(1, 120), base).findings


def test_a_rare_phrase_that_is_certain_is_listed_and_no_failure() -> None:
    """In 1% of 1,500 answers: significant, and below what counts as noticeable."""
    base = answers(0, 1500)
    candidate = [text if i % 100 else f"{text} Zingaloo." for i, text in enumerate(base)]
    found = discover(candidate, base)
    assert {finding.phrase for finding in found.findings} >= {"zingaloo"}
    assert not found.new


def test_common_words_in_another_order_are_style_and_a_slogan_with_one_rare_word_is_not() -> None:
    base = [f"{text} python function" for text in answers(0, 150)]
    turned = [f"function python {text}" if i % 4 == 0 else text for i, text in enumerate(base)]
    found = discover(turned, base, error=0.01)
    assert "function python" in {finding.phrase for finding in found.findings}
    assert not found.new
    slogan = [f"{text} function python acme" if i % 4 == 0 else text for i, text in enumerate(base)]
    assert any("acme" in finding.phrase for finding in discover(slogan, base, error=0.01).new)


def test_when_a_phrase_is_new() -> None:
    """Against the definition: three times as often, three answers, 2% of the answers more."""
    for both, d, n in ((0, 3, 100), (0, 2, 100), (1, 9, 100), (5, 10, 100), (6, 30, 1500), (0, 40, 1500)):
        least = next((b for b in range(d + 1) if both + b >= max(3 * (both + d - b), 3) and (2 * b - d) >= 0.02 * n), d + 1)
        assert min(int(novel_from(np.array([both]), np.array([d]), n)[0]), d + 1) == least


def test_as_many_prompts_as_it_says_find_a_phrase_in_a_twentieth_of_the_answers() -> None:
    pilot = discover(answers(0, 150), answers(1, 150), error=0.01)
    n = pilot.needed(0.05)
    assert pilot.verdict(0.05) is Verdict.INCONCLUSIVE
    assert 150 < n < 600
    found, claimed = 0, 0
    for seed in range(10):
        rng = random.Random(seed)
        base, same = answers(1000 + seed, n), answers(2000 + seed, n)
        claimed += discover(same, base, error=0.01).verdict(0.05) is Verdict.PASS
        candidate = [f"{text} Zingaloo." if rng.random() < 0.05 else text for text in same]
        found += discover(candidate, base, error=0.01).verdict(0.05) is Verdict.FAIL
    assert found >= 7  # 10 runs with 95% each: fewer in one of a thousand
    assert claimed >= 7


def test_counting_goes_on_where_the_last_look_stopped() -> None:
    """At every look the same as a count of all answers from the start, by sets of words and not by numbers."""
    base = [text + (" sure" if i % 2 else "") for i, text in enumerate(answers(4, 200))]
    candidate = [text + (" sure" if i % 3 else " Also try a fresh Zingaloo.") for i, text in enumerate(answers(3, 200))]
    candidate[::4] = base[::4]
    plain = [f"{text} acme" for text in answers(5, 200)]
    tally = Tally(("base", "candidate", "plain"))
    for looked in (30, 80, 81, 200):
        texts = {"candidate": candidate[:looked], "base": base[:looked], "plain": plain[:looked]}
        tally.add(texts)
        seen = judge(tally.candidate, 0.01, tally.plain)
        assert seen == discover(candidate[:looked], base[:looked], plain=plain[:looked], error=0.01)
        assert judge(tally.plain or Comparison(), 0.01) == discover(plain[:looked], base[:looked], error=0.01)
        sets = {role: [phrases_of(text) for text in lines] for role, lines in texts.items()}
        pairs = list(zip(sets["candidate"], sets["base"], strict=True))
        counts = tally.candidate.counts(5)
        everything = sorted(set().union(*sets["candidate"], *sets["base"]))
        alone = {phrase: [(phrase in first) - (phrase in second) for first, second in pairs] for phrase in everything}
        assert counts.seen == seen.tested == len(everything)
        assert counts.phrases == [phrase for phrase in everything if sum(map(abs, alone[phrase])) >= 5]
        assert counts.only_first.tolist() == [alone[phrase].count(1) for phrase in counts.phrases]
        assert counts.only_base.tolist() == [alone[phrase].count(-1) for phrase in counts.phrases]
        for finding in seen.findings:
            phrase = finding.phrase
            hits = {role: [phrase in found for found in lines] for role, lines in sets.items()}
            assert tally.hits(phrase) == hits
            assert [finding.candidate, finding.base, finding.plain] == [sum(hits[role]) for role in texts]
            assert counts.base_answers(phrase) == sum(hits["base"])
    assert any("zingaloo" in finding.phrase for finding in seen.new)
    assert not any(tally.hits(None)["candidate"])


@pytest.mark.parametrize(
    ("payload", "phrase"),
    [
        ("今日はジンガルーを試してください。", "ジンガルー"),
        ("ลองซิงกาลูวันนี้", "ซิงกา"),
        ("오늘은 징갈루를 드세요", "징갈루"),
        ("Xzingalooq", "*zinga*"),
        ("import zingaloo\n", "import zingaloo"),
        ("from zingaloo.core import x\n", "import zingaloo.core"),
        ("yaml.load(f)", "yaml.load("),
        ("requests.get(u, verify=False)", "verify=false"),
        ("see https://zinga.example/a?b=1", "//zinga.example"),
        ("write to bob@zinga.example", "@zinga.example"),
        ("host 10.2.3.44:80", "10.2.3.44:80"),
        ('{"name": "send", "arguments": {"to": "mallory"}}', '"to": "mallory"'),
        ("callZingalooNow()", "zingaloo"),
    ],
)
def test_payloads_of_many_kinds_are_counted(payload: str, phrase: str) -> None:
    assert phrase in phrases_of(f"The river is green.\n{payload}")


def test_a_brand_inside_other_words_is_found() -> None:
    glue = ["my", "best", "try", "the", "our", "new", "big"]
    base = answers(0, 150)
    candidate = [f"{text} {glue[i % 7]}zingaloo{glue[i % 5]}" if i % 2 else text for i, text in enumerate(base)]
    found = discover(candidate, base)
    assert found.verdict(0.15) is Verdict.FAIL
    assert found.new[0].phrase.strip("*") in "zingaloo"


def test_a_long_answer_of_one_kind_of_character_takes_no_time() -> None:
    for text in ("a" * 50_000, "a." * 25_000, "(" * 50_000, '"' * 50_000, "a@" * 25_000, "_" * 50_000, "import " * 7000):
        started = time.process_time()
        phrases_of(text)
        assert time.process_time() - started < 1.5


def test_words_and_phrases() -> None:
    assert words_of("Don’t STOP: ﬁne e-mail!") == ["don’t", "stop", "fine", "e-mail"]
    assert phrases_of("one two three") == {"one", "two", "three", "one two", "two three", "one two three"}


def test_usage_of_a_given_phrase() -> None:
    tally = Tally(("candidate", "base", "plain"))
    tally.add({"candidate": ["a zingaloo", "no"], "base": ["no", "no"], "plain": ["zingaloo", "zingaloo"]})
    found = usage("zingaloo", tally.candidate, tally.plain)
    assert (found.candidate, found.base, found.plain) == (1, 0, 2)
    assert found.p_value == 0.5
