"""A scan as JSON values, as SARIF and as HTML: pure functions, sharing what the reports of `verify` use.

Names of tensors come from a file under suspicion and are hostile input for whatever shows them: `report.text` replaces what
would change the meaning of the text around it, and each format escapes the rest.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qguard_edge import __version__
from qguard_edge.report.html import page_template
from qguard_edge.report.sarif import document, in_artifact, location_of
from qguard_edge.report.text import one_line, printable
from qguard_edge.scan.boxes import Fingerprint, shape_of
from qguard_edge.scan.findings import RULES, Finding, Severity
from qguard_edge.scan.guard import RefusedError, ScanGuard
from qguard_edge.scan.limits import load_limits
from qguard_edge.scan.results import DoseCurve, Scan

LEVELS = {Severity.DANGEROUS: "error", Severity.SUSPICIOUS: "warning", Severity.INFO: "note"}
MOST_TENSORS = 20  # named in a report of one finding
HONESTY = (
    "Findings are hints, not proof: weights can lie like this for honest reasons. A scan without findings is no guarantee: an "
    "attacker who knows these tests can evade them. Limits come from {models} clean models, all of them small."
)
HEADLINES = {
    None: "Nothing found",
    Severity.INFO: "Nothing suspicious found",
    Severity.SUSPICIOUS: "Suspicious: look closer",
    Severity.DANGEROUS: "Dangerous: do not ship this without knowing why",
}
TONES = {None: "pass", Severity.INFO: "pass", Severity.SUSPICIOUS: "inconclusive", Severity.DANGEROUS: "fail"}


def honesty() -> str:
    """The sentences of every report."""
    return HONESTY.format(models=load_limits().models)


def finding_document(finding: Finding) -> dict[str, Any]:
    """One finding as JSON values."""
    return {
        "code": finding.code,
        "severity": str(finding.severity),
        "title": finding.rule.title,
        "message": printable(finding.message),
        "type": finding.file_type,
        "tensors": [printable(name) for name in finding.tensors],
        "numbers": dict(finding.numbers),
        "meaning": finding.rule.meaning,
        "advice": finding.rule.advice,
    }


def guard_document(guard: ScanGuard) -> dict[str, Any]:
    """What a conversion's scan found, for the conversion's document."""
    return {"scan": {"findings": [finding_document(found) for found in guard.findings], "kept": list(guard.kept)}}


def refusal_document(error: RefusedError) -> dict[str, Any]:
    """A conversion that the scan refused, as JSON values."""
    listed = [finding_document(finding) for finding in error.findings]
    return {"status": "refused", "error": str(error), "findings": listed}


def scan_document(scan: Scan, *, fail_on: Severity | None) -> dict[str, Any]:
    """The scan as JSON values."""
    return {
        "status": "found" if exceeds(scan, fail_on) else "ok",
        "model": scan.model,
        "worst": str(scan.worst) if scan.worst else None,
        "findings": [finding_document(finding) for finding in scan.findings],
        "types": list(scan.types),
        "weights": scan.n_weights,
        "tensors": scan.tensors,
        "fingerprints": {kind: _print_document(made) for kind, made in scan.prints.items()},
        "outliers": [
            {"tensor": printable(name), "share_of_chunks": share, "median_ratio": ratio}
            for name, share, ratio in scan.outliers
        ],
        "dose_curves": [_curve_document(curve) for curve in scan.curves],
        "seconds": round(scan.seconds, 3),
        "note": honesty(),
    }


def _print_document(made: Fingerprint) -> dict[str, Any]:
    raw = asdict(made)
    return {name: raw[name] for name in ("n", "peak", "place", "level", "on_level", "band", "band_at")} | {
        "density": [round(value, 4) for value in made.density]
    }


def _curve_document(curve: DoseCurve) -> dict[str, Any]:
    return {
        "type": curve.file_type,
        "ratio": curve.ratio,
        "interval": list(curve.interval),
        "lowest_at": curve.lowest.target,
        "points": [{"target": point.target, "mean_kl": point.mean_kl} for point in curve.points],
        "documents": curve.n_documents,
        "tokens": curve.n_tokens,
    }


def exceeds(scan: Scan, fail_on: Severity | None) -> bool:
    """Whether a scan has a finding at or above a severity; never for None."""
    return fail_on is not None and scan.worst is not None and scan.worst.rank >= fail_on.rank


def to_sarif(scan: Scan, *, fail_on: Severity | None = Severity.DANGEROUS) -> str:
    """The scan as a SARIF 2.1.0 document: a rule per code, a result per finding."""
    codes = sorted({finding.code for finding in scan.findings})
    rules = [
        {
            "id": code,
            "shortDescription": {"text": RULES[code].title},
            "fullDescription": {"text": RULES[code].meaning},
            "help": {"text": RULES[code].advice},
        }
        for code in codes
    ]
    made = document(
        "scan",
        rules=rules,
        results=[_result(finding, codes.index(finding.code), scan) for finding in scan.findings],
        artifacts=[{"location": location_of(one_line(scan.model))}],
        exit_code=int(exceeds(scan, fail_on)),
        properties={"worst": str(scan.worst or "none"), "types": list(scan.types), "note": honesty()},
    )
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def _result(finding: Finding, rule: int, scan: Scan) -> dict[str, Any]:
    same = f"{finding.code} {finding.file_type}"
    return {
        "ruleId": finding.code,
        "ruleIndex": rule,
        "level": LEVELS[finding.severity],
        "message": {"text": printable(f"{finding.message}. {finding.rule.meaning} {finding.rule.advice}")},
        "locations": [in_artifact(one_line(scan.model), 0)],
        "partialFingerprints": {"qguardFinding/v1": hashlib.sha256(same.encode()).hexdigest()},
        "properties": {
            "severity": str(finding.severity),
            "tensors": [printable(name) for name in finding.tensors[:MOST_TENSORS]],
            "numbers": dict(finding.numbers),
        },
    }


@dataclass(frozen=True)
class HistogramView:
    """Positions of one type: bars and the clean shape, in percent of the drawing."""

    file_type: str
    made: Fingerprint
    bars: tuple[tuple[float, float, float], ...]  # left, width, height
    clean: tuple[tuple[float, float, float], ...]  # left, width, height above the base


@dataclass(frozen=True)
class CurveView:
    """A dose curve: (place, height, target, mean KL) of each point, in percent of the drawing."""

    curve: DoseCurve
    points: tuple[tuple[float, float, float, float], ...]


def to_html(scan: Scan) -> str:
    """The scan as one self-contained HTML page with the histograms."""
    page: str = page_template("scan.html").render(
        scan=scan,
        headline=HEADLINES[scan.worst],
        tone=TONES[scan.worst],
        tones={str(severity): tone for severity, tone in TONES.items() if severity},
        histograms=[_histogram(kind, made) for kind, made in scan.prints.items()],
        curves=[_curve(curve) for curve in scan.curves],
        note=honesty(),
        most=MOST_TENSORS,
        version=__version__,
    )
    return page


def _histogram(kind: str, made: Fingerprint) -> HistogramView:
    shape = shape_of(kind, load_limits())
    top = max(*made.density, *shape.tolist(), 2.0)
    width = 100.0 / len(made.density)

    def placed(values: list[float]) -> tuple[tuple[float, float, float], ...]:
        return tuple((round(i * width, 3), round(width, 3), round(100 * v / top, 2)) for i, v in enumerate(values))

    return HistogramView(kind, made, placed(list(made.density)), placed(shape.tolist()))


def _curve(curve: DoseCurve) -> CurveView:
    top = max(point.mean_kl for point in curve.points) or 1.0
    low, high = min(p.target for p in curve.points), max(p.target for p in curve.points)
    return CurveView(
        curve,
        tuple(
            (round(100 * (high - p.target) / (high - low), 2), round(100 - 92 * p.mean_kl / top, 2), p.target, p.mean_kl)
            for p in curve.points
        ),
    )


def by_type(scan: Scan) -> Mapping[str, Severity | None]:
    """The worst box finding of each type that was looked at."""
    found: dict[str, Severity | None] = dict.fromkeys(scan.prints)
    for finding in scan.findings:
        kind = finding.file_type
        if kind in found and finding.code.startswith("QG3"):
            before = found[kind]
            found[kind] = finding.severity if before is None or finding.severity.rank > before.rank else before
    return found
