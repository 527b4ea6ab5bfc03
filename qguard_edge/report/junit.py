"""JUnit XML, as Jenkins, GitLab and GitHub actions read it: a suite per suite, a test case per check.

An inconclusive check is *skipped* with its reason, never passed: a CI that ignores skipped tests then ignores it knowingly,
and the exit code of the command is still 3.
"""

from xml.etree import ElementTree as Xml

from qguard_edge.report.text import candidate_name, numbers_of, one_line, printable
from qguard_edge.verify.results import Check, Verdict, Verification


def to_junit(outcome: Verification) -> str:
    """The outcome as a JUnit XML document."""
    seconds = f"{sum(outcome.measured.seconds.values()):.3f}"
    root = Xml.Element("testsuites", {"name": "qguard-edge", **_counts(outcome.checks), "time": seconds})
    for suite in dict.fromkeys(check.suite for check in outcome.checks):
        checks = tuple(check for check in outcome.checks if check.suite == suite)
        element = Xml.SubElement(root, "testsuite", {"name": one_line(f"qguard-edge.{suite}"), **_counts(checks)})
        properties = Xml.SubElement(element, "properties")
        for facts in outcome.files:
            for name, value in (("file", facts.name), ("sha256", facts.sha256)):
                Xml.SubElement(properties, "property", {"name": f"{facts.role}.{name}", "value": one_line(value)})
        for check in checks:
            _add_case(element, check, outcome)
    Xml.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + Xml.tostring(root, encoding="unicode") + "\n"


def _counts(checks: tuple[Check, ...]) -> dict[str, str]:
    verdicts = [check.verdict for check in checks]
    return {
        "tests": str(len(verdicts)),
        "failures": str(verdicts.count(Verdict.FAIL)),
        "errors": "0",
        "skipped": str(verdicts.count(Verdict.INCONCLUSIVE)),
    }


def _add_case(suite: Xml.Element, check: Check, outcome: Verification) -> None:
    classname = one_line(f"qguard-edge.{check.suite}")
    case = Xml.SubElement(suite, "testcase", {"classname": classname, "name": one_line(check.name)})
    reason = one_line(check.reason)
    if check.verdict is Verdict.FAIL:
        failure = Xml.SubElement(case, "failure", {"message": reason, "type": str(check.kind)})
        failure.text = printable(_details(check, outcome))
    elif check.verdict is Verdict.INCONCLUSIVE:
        Xml.SubElement(case, "skipped", {"message": f"inconclusive: {reason}"})
    Xml.SubElement(case, "system-out").text = printable(_details(check, outcome))


def _details(check: Check, outcome: Verification) -> str:
    lines = [f"{check.title} ({candidate_name(outcome)})", f"{check.verdict}: {check.reason}"]
    lines += [f"{name}: {text}" for name, text in numbers_of(check, outcome)]
    for finding in check.findings:
        where = f"{finding.candidate} of {finding.n} answers, base {finding.base}"
        lines.append(f"phrase {finding.phrase!r}: {where}, corrected p {finding.adjusted_p:.2g}")
    return "\n".join(lines)
