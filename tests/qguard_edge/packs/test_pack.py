"""The pack format: there and back, the shipped schema, and damaged packs."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import qguard_edge
from qguard_edge.packs.matchers import matchers_as_values, suite_of
from qguard_edge.packs.pack import Pack, PackError, pack_from_json, pack_schema, pack_to_json, read_pack
from qguard_edge.verify.suites.base import Suite, SuitePrompt
from qguard_edge.verify.suites.code import BanditMatcher, UnparsedMatcher
from qguard_edge.verify.suites.files import BUILT_IN, built_in
from qguard_edge.verify.suites.matchers import ExactMatcher, PhraseMatcher, RefusalMatcher, RegexMatcher

EXAMPLE = Path(__file__).parent / "data" / "pack-3.json"
SCHEMA = Path(qguard_edge.__file__).parent / "data" / "schemas" / "pack-3.json"


def document() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    return read


def test_the_example_comes_back_as_it_was() -> None:
    pack = read_pack(EXAMPLE)
    assert isinstance(pack, Pack)
    assert pack_from_json(pack_to_json(pack)) == pack
    assert json.loads(pack_to_json(pack)) == document()


def test_the_shipped_schema_is_that_of_the_code_and_the_example_fits() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert schema == pack_schema()
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(document())
    assert not validator.is_valid({**document(), "top_k": "3"})


def test_all_matchers_come_back() -> None:
    matchers = (
        PhraseMatcher(("Acme",), "given-phrases"),
        RegexMatcher(("(?i)x",)),
        RefusalMatcher(),
        RefusalMatcher(with_reason=True, name="refusals-with-reason"),
        BanditMatcher("high", ("B105",)),
        UnparsedMatcher(),
        ExactMatcher(contains=True),
    )
    suite = Suite("mine", "Mine", (SuitePrompt("a", "b", expected="c"),), matchers, new_tokens=5)
    fields = {"name": "mine", "title": "Mine", "new_tokens": 5, "discovery": True}
    prompts = [{"id": "a", "text": "b", "expected": "c"}]
    assert suite_of({**fields, "matchers": list(matchers_as_values(matchers)), "prompts": prompts}) == suite


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_suites_fit_into_a_pack(name: str) -> None:
    suite = built_in(name)
    fields = {"name": suite.name, "title": suite.title, "new_tokens": suite.new_tokens, "discovery": suite.discovery}
    made = suite_of({**fields, "matchers": list(matchers_as_values(suite.matchers)), "prompts": ["a"]})
    assert made.matchers == suite.matchers


def _other_version(pack: dict[str, Any]) -> None:
    pack["pack_version"] = 4


def _foreign_token(pack: dict[str, Any]) -> None:
    pack["suites"][0]["prompts"][0]["tokens"][0] = pack["vocabulary"]


def _negative_token(pack: dict[str, Any]) -> None:
    pack["texts"][0]["top_ids"][0][0] = -1


def _missing_row(pack: dict[str, Any]) -> None:
    pack["texts"][0]["next_logprobs"].pop()


def _short_row(pack: dict[str, Any]) -> None:
    pack["texts"][0]["top_logprobs"][0].pop()


def _too_likely(pack: dict[str, Any]) -> None:
    pack["texts"][0]["top_logprobs"][0][0] = 0.5


def _probe_outside(pack: dict[str, Any]) -> None:
    pack["texts"][0]["probes"][0]["tokens"] = 10_000


def _no_texts(pack: dict[str, Any]) -> None:
    pack["texts"] = []


def _unknown(pack: dict[str, Any]) -> None:
    pack["suites"][0]["prompts"][0]["surprise"] = 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_version, "version 3: pack_version"),
        (_foreign_token, "a token id outside"),
        (_negative_token, "a token id outside"),
        (_missing_row, "rows of log-probabilities"),
        (_short_row, "different tokens"),
        (_too_likely, "above 0"),
        (_probe_outside, "a probe outside"),
        (_no_texts, "no text"),
        (_unknown, "suites.0.prompts.0.surprise"),
    ],
)
def test_damaged_packs_are_one_sentence(change: Any, words: str) -> None:
    pack = document()
    change(pack)
    with pytest.raises(PackError, match=words):
        pack_from_json(json.dumps(pack))


def test_a_bad_matcher_is_one_sentence() -> None:
    pack = document()
    pack["suites"][0]["matchers"] = [{"type": "regex", "patterns": ["("]}]
    read = pack_from_json(json.dumps(pack))
    with pytest.raises(PackError, match="is not valid"):
        read.suites[0].suite()


def test_not_a_pack(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="cannot read"):
        read_pack(tmp_path / "missing.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(PackError, match=r"x\.json: this is not a baseline pack"):
        read_pack(tmp_path / "x.json")
