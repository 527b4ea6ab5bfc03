"""SARIF 2.1.0 for code scanning: a rule per check, a result per check that does not pass.

A failed check has kind `fail` and level `error`. An inconclusive one has kind `open`, SARIF's word for "not enough
information to decide", and so the level `none` that the standard requires for every kind but `fail`. Checks that pass are
rules without a result, because some services show every result as an alert, whatever its kind.
"""

import hashlib
import json
from typing import Any
from urllib.parse import quote

from qguard_edge import __version__
from qguard_edge.report.text import numbers_of, one_line, printable
from qguard_edge.verify.results import Check, FileFacts, Verdict, Verification

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def to_sarif(outcome: Verification) -> str:
    """The outcome as a SARIF document."""
    return json.dumps(sarif_document(outcome), indent=2, ensure_ascii=False) + "\n"


def sarif_document(outcome: Verification) -> dict[str, Any]:
    """The outcome as SARIF's JSON values."""
    indices = {facts.role: i for i, facts in reversed(list(enumerate(outcome.files)))}
    return document(
        "verify",
        rules=[_rule(check) for check in outcome.checks],
        results=[
            _result(check, number, outcome, indices.get("candidate"))
            for number, check in enumerate(outcome.checks)
            if check.verdict is not Verdict.PASS
        ],
        artifacts=[_artifact(facts) for facts in outcome.files],
        exit_code=outcome.verdict.exit_code,
        properties={"verdict": str(outcome.verdict), "summary": printable(outcome.summary)},
    )


def document(
    command: str,
    *,
    rules: list[dict[str, Any]],
    results: list[dict[str, Any]],
    artifacts: list[dict[str, Any]],
    exit_code: int,
    properties: dict[str, Any],
) -> dict[str, Any]:
    """A SARIF document of one run of one of our commands.

    Args:
        command: whose run it is.
        rules: SARIF's rules.
        results: SARIF's results.
        artifacts: SARIF's artifacts.
        exit_code: the command's.
        properties: about the run as a whole.
    """
    driver = {"name": "qguard-edge", "version": __version__, "semanticVersion": __version__, "rules": rules}
    run: dict[str, Any] = {
        "tool": {"driver": driver},
        "automationDetails": {"id": f"qguard-edge/{command}/"},
        "invocations": [{"executionSuccessful": True, "exitCode": exit_code, "properties": properties}],
        "artifacts": artifacts,
        "results": results,
        "columnKind": "unicodeCodePoints",
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(check: Check) -> dict[str, Any]:
    return {
        "id": one_line(check.id),
        "shortDescription": {"text": one_line(check.title)},
        "fullDescription": {"text": f"{one_line(check.title)}: the candidate must be no worse than its base."},
        "defaultConfiguration": {"level": "error"},
        "properties": {"tags": [str(check.kind)], "verdict": str(check.verdict)},
    }


def _artifact(facts: FileFacts) -> dict[str, Any]:
    found: dict[str, Any] = {"location": location_of(facts.name), "length": facts.size, "properties": {"role": facts.role}}
    if facts.sha256:
        found["hashes"] = {"sha-256": facts.sha256}
    return found


def location_of(name: str) -> dict[str, Any]:
    """SARIF's location of a file or folder, by name only."""
    return {"uri": quote(name.encode("utf-8", "replace"), safe="")}


def in_artifact(name: str, index: int) -> dict[str, Any]:
    """SARIF's location of a result in an artifact."""
    # A model has no lines, but code scanning refuses a result without one.
    return {"physicalLocation": {"artifactLocation": {**location_of(name), "index": index}, "region": {"startLine": 1}}}


def _result(check: Check, rule: int, outcome: Verification, artifact: int | None) -> dict[str, Any]:
    failed = check.verdict is Verdict.FAIL
    numbers = [f"{name}: {text}" for name, text in numbers_of(check, outcome)]
    result: dict[str, Any] = {
        "ruleId": one_line(check.id),
        "ruleIndex": rule,
        "kind": "fail" if failed else "open",
        "level": "error" if failed else "none",
        "message": {"text": printable("\n".join([check.reason, *numbers]))},
        "partialFingerprints": {"qguardCheck/v1": hashlib.sha256(check.id.encode("utf-8", "replace")).hexdigest()},
    }
    if artifact is not None:
        result["locations"] = [in_artifact(outcome.files[artifact].name, artifact)]
    return result
