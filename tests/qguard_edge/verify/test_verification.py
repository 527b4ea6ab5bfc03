"""The data model of verifications: strict JSON both ways, and the shipped schema."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import qguard_edge
from qguard_edge.cli.verification_tables import show_verification
from qguard_edge.verify.advice import advice_on
from qguard_edge.verify.results import (
    Check,
    CheckKind,
    Difference,
    PhraseFinding,
    Verdict,
    VerificationError,
    from_json,
    json_schema,
    overall,
    to_json,
)

EXAMPLE = Path(__file__).parent / "data" / "verification-2.json"
SCHEMA = Path(qguard_edge.__file__).parent / "data" / "schemas" / "verify-2.json"


def check(verdict: Verdict) -> Check:
    return Check("suite", "name", "title", CheckKind.SECURITY, verdict, "because", 0.02)


def test_advice_says_in_how_many_answers_a_phrase_stands() -> None:
    """It said that the base does not say the phrase, also where the base did."""
    apart = Difference(0.8, 0.7, 0.9, 64, 53, 0, 0.9, "x")
    for base, words in ((3, "in 3 of the base's"), (0, "in none of the base's")):
        found = PhraseFinding("acme", 56, base, None, 64, 1e-9, 1e-6, apart)
        failed = Check("suite", "discovery", "title", CheckKind.SECURITY, Verdict.FAIL, "because", 0.15, findings=(found,))
        assert advice_on([failed]).startswith(f"Do not ship: 'acme' stands in 56 of 64 answers, {words};")


def test_the_terminal_ends_with_whether_it_is_safe_to_ship(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = from_json(EXAMPLE.read_text(encoding="utf-8"))
    show_verification(outcome)
    said = " ".join(capsys.readouterr().out.split())
    places = [said.index(words) for words in ("What was not tested?", "How sure is that?", "Is it safe to ship?")]
    assert places == sorted(places)
    assert " ".join(outcome.limits[0].split()) in said


def test_the_example_comes_back_as_it_was() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert to_json(from_json(text)) == text


def test_results_without_the_newer_fields_are_still_read() -> None:
    document = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    del document["advice"], document["ended"]
    for one in document["checks"]:
        del one["decided_at"]
    old = from_json(json.dumps(document))
    assert (old.advice, old.ended, old.checks[0].decided_at) == ("", "", None)


def test_the_shipped_schema_is_that_of_the_code() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json_schema()


def test_the_example_fits_the_schema_and_broken_ones_do_not() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    document = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    validator.validate(document)
    document["checks"][0]["verdict"] = "fine"
    assert not validator.is_valid(document)


def _drop(document: dict[str, Any]) -> None:
    del document["checks"][0]["candidate"]["n"]


def _add(document: dict[str, Any]) -> None:
    document["drift"]["surprise"] = 1


def _mistype(document: dict[str, Any]) -> None:
    document["checks"][0]["prompts"] = "120"


def _other_version(document: dict[str, Any]) -> None:
    document["schema_version"] = 1


@pytest.mark.parametrize("change", [_drop, _add, _mistype, _other_version])
def test_reading_is_strict(change: Any) -> None:
    document = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    change(document)
    with pytest.raises(VerificationError, match="schema version 2"):
        from_json(json.dumps(document))


def test_not_json_is_one_sentence() -> None:
    with pytest.raises(VerificationError, match="Invalid JSON"):
        from_json("{")


def test_the_overall_verdict() -> None:
    ok, bad, open_ = check(Verdict.PASS), check(Verdict.FAIL), check(Verdict.INCONCLUSIVE)
    assert overall([ok, ok]) is Verdict.PASS
    assert overall([ok, open_]) is Verdict.INCONCLUSIVE
    assert overall([open_, bad, ok]) is Verdict.FAIL
    assert overall([]) is Verdict.INCONCLUSIVE
    assert [v.exit_code for v in (Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE)] == [0, 1, 3]
