"""A gate for a pipeline: scan a model, convert it, verify the result; a JSON report and an exit code say how it went.

    python gate_in_ci.py MODEL OUT.gguf REPORT.json [--type q4_k] [--suites injection,refusal] [--limit N]

Exit codes: 0 pass, 1 refused by the scan or failed by the verification, 2 something could not be done, 3 inconclusive.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from qguard_edge import QGuardError, RefusedError, ScanGuard, convert, request_for, to_document


def gate(arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The exit code and the report."""
    guard = ScanGuard()  # refuses what the scan calls dangerous, and keeps everything it found
    try:
        request = request_for(arguments.model, arguments.type, outfile=arguments.out, overwrite=True)
        report = convert(request, scan=guard, verify=arguments.suites, verify_limit=arguments.limit)
    except RefusedError as refusal:
        return 1, to_document(refusal)
    except QGuardError as error:
        return 2, {"status": "error", "error": str(error)}
    assert report.verification is not None  # for suites were given
    return report.verification.verdict.exit_code, to_document(report, scan=guard)


def main() -> int:
    """Read the arguments, run the gate, write the report."""
    parser = argparse.ArgumentParser(description="Scan, convert, verify.")
    parser.add_argument("model", help="folder, hub id or full-precision .gguf")
    parser.add_argument("out", type=Path, help="the GGUF to write; with a failing verdict it is called NAME.rejected.gguf")
    parser.add_argument("report", type=Path, help="the JSON report to write")
    parser.add_argument("--type", default="q4_k", help="llama.cpp file type")
    parser.add_argument("--suites", default="injection,refusal", help="built-in suites; drift is always measured")
    parser.add_argument("--limit", type=int, help="prompts per suite, and texts, at most; too few decide nothing")
    arguments = parser.parse_args()
    code, document = gate(arguments)
    arguments.report.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"{document['status']}: exit code {code}, see {arguments.report.name}")
    return code


if __name__ == "__main__":
    sys.exit(main())
