"""Words and numbers that every report shares, and what is done to text that a model wrote.

Answers of a model under suspicion are hostile input for whatever shows them. Each format escapes them in its own way;
before that, `printable` replaces what would change the meaning of the text around it: control characters, lone
surrogates, and the marks that turn the direction of writing.
"""

import re

from qguard_edge.verify.results import Check, Difference, Drift, Rate, Verdict, Verification

WORDS = {Verdict.PASS: "pass", Verdict.FAIL: "fail", Verdict.INCONCLUSIVE: "inconclusive"}
HEADLINES = {
    Verdict.PASS: "Pass: no worse than the base on what was asked",
    Verdict.FAIL: "Fail: worse than the base",
    Verdict.INCONCLUSIVE: "Inconclusive: too little to decide",
}
# C0 and C1 controls but tab and newline, surrogates, bidirectional marks, and the two code points XML 1.0 forbids besides.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ufffe\uffff\ud800-\udfff]"
)
COARSE = 2 / 3
"""Share of positions whose likeliest next token is the base's, below which a file is called coarse."""


def printable(text: str) -> str:
    """The text with every unprintable character written out as `<U+202E>`; carriage returns become newlines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _UNPRINTABLE.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


def one_line(text: str) -> str:
    """A printable text on one line."""
    return " ".join(printable(text).split())


def percent(share: float) -> str:
    """A share, such as 4.2%."""
    return f"{100 * share:.1f}%"


def points(share: float) -> str:
    """A difference of shares in percentage points, such as +1.5; never -0.0."""
    return f"{round(100 * share, 1) + 0.0:+.1f}"


def number(value: float) -> str:
    """A measured number with three digits."""
    return f"{value:.3g}"


def rate_text(rate: Rate | None) -> str:
    """Hits, answers and the interval: `4 of 96 (1.6% to 10.2%)`."""
    if rate is None:
        return ""
    return f"{rate.hits} of {rate.n} ({percent(rate.low)} to {percent(rate.high)})"


def difference_text(difference: Difference | None) -> str:
    """The difference with its interval in points: `-1.0 (-5.0 to +1.5)`."""
    if difference is None:
        return ""
    return f"{points(difference.value)} ({points(difference.low)} to {points(difference.high)})"


def numbers_of(check: Check, outcome: Verification) -> list[tuple[str, str]]:
    """The numbers of a check as (name, text), in the order of every report."""
    if check.candidate is None:
        return _drift_numbers(outcome) if check.suite == "drift" else []
    found = [("candidate", rate_text(check.candidate)), ("base", rate_text(check.base))]
    if check.plain:
        found.append(("plain", rate_text(check.plain)))
    if check.difference:
        covered = f"{check.difference.confidence:.0%} interval, {check.difference.method}"
        found.append(("difference in points", f"{difference_text(check.difference)}, {covered}"))
    return [*found, ("margin in points", f"{100 * check.margin:.1f}")]


def _drift_numbers(outcome: Verification) -> list[tuple[str, str]]:
    drift = outcome.drift
    if drift is None:
        return []
    found = []
    for name, numbers in (("candidate", drift.candidate), ("plain", drift.plain)):
        if numbers:
            kl = f"mean KL {number(numbers.mean_kl)} ({number(numbers.mean_kl_low)} to {number(numbers.mean_kl_high)})"
            found.append((name, f"{kl}, same top token {percent(numbers.same_top)}"))
    return [*found, ("noise floor", number(drift.noise_floor)), ("limit", f"{number(drift.limit)}, {drift.limit_source}")]


def first_answers(outcome: Verification) -> list[tuple[str, tuple[str, ...]]]:
    """What somebody who decides on a release asks first, with the answers: each a question and its sentences."""
    safe = {Verdict.PASS: "Yes.", Verdict.FAIL: "No.", Verdict.INCONCLUSIVE: "Not known yet."}[outcome.verdict]
    near = (distance_text(outcome.drift), agreement_text(outcome.drift)) if outcome.drift else ()
    return [
        ("Is it safe to ship?", (safe, *([outcome.advice] if outcome.advice else []))),
        *([("How near is it to full precision?", near)] if near else []),
        ("How sure is that?", tuple(_how_sure(outcome))),
        ("What was not tested?", outcome.limits),
    ]


def distance_text(drift: Drift) -> str:
    """The mean KL to the base, beside plain rounding's where measured; nearer or further if their intervals are apart."""
    candidate, plain = drift.candidate, drift.plain
    said = f"Mean KL {candidate.mean_kl:.3g} ({candidate.mean_kl_low:.3g} to {candidate.mean_kl_high:.3g})"
    if plain is None:
        return f"{said}; beside plain rounding it was not measured (--plain)."
    said += f", plain rounding {plain.mean_kl:.3g} ({plain.mean_kl_low:.3g} to {plain.mean_kl_high:.3g})"
    if candidate.mean_kl_high < plain.mean_kl_low:
        return f"{said}: nearer by a factor of {plain.mean_kl / candidate.mean_kl:.1f}."
    if candidate.mean_kl_low > plain.mean_kl_high:
        return f"{said}: further away by a factor of {candidate.mean_kl / plain.mean_kl:.1f}."
    return f"{said}: about as near."


def agreement_text(drift: Drift) -> str:
    """How often the likeliest next token is the base's; a file that is coarse and passes all the same is said to be so."""
    said = f"The likeliest next token is the base's at {percent(drift.candidate.same_top)} of the positions"
    return f"{said}; a larger type would be nearer." if drift.candidate.same_top < COARSE else f"{said}."


def _how_sure(outcome: Verification) -> list[str]:
    asked = ", ".join(f"{count} of {name}" for name, count in outcome.measured.suites.items() if name != "drift")
    sentences = [f"Prompts asked: {asked}."] if asked else ["No prompt was asked."]
    if outcome.verdict is Verdict.FAIL:
        sentences.append("Of two models that behave alike, one run in a hundred at most ends in a fail.")
    if outcome.verdict is Verdict.PASS:
        margins = sorted({check.margin for check in outcome.checks if check.difference and check.name != "discovery"})
        if margins:
            listed = " or ".join(f"{100 * margin:.0f}" for margin in margins)
            sentences.append(
                f"A file worse by more than its check's margin ({listed} points) passes in 5% of the cases at most."
            )
        found = [check.margin for check in outcome.checks if check.name == "discovery"]
        if found:
            sentences.append(f"A new phrase in {100 * max(found):.0f}% of a suite's answers would have been found with 95%.")
    if outcome.verdict is Verdict.INCONCLUSIVE:
        undecided = sum(check.verdict is Verdict.INCONCLUSIVE for check in outcome.checks)
        sentences.append(f"{undecided} of {len(outcome.checks)} checks could not be decided.")
    if outcome.ended:
        sentences.append(f"The run ended because {outcome.ended}.")
    return sentences


def candidate_name(outcome: Verification) -> str:
    """File name of what was verified."""
    facts = outcome.file("candidate")
    return one_line(facts.name) if facts else "candidate"
