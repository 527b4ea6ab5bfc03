"""Convert a model hardened, show that only code bits differ from llama.cpp's own file, and ask both a few prompts.

    python convert_and_check.py MODEL [OUT.gguf]

MODEL is a Hugging Face folder, a hub id, or a full-precision .gguf file; a folder is written as an F32 GGUF beside OUT first,
which loses nothing, so that there is something to compare with.
"""

import sys
from pathlib import Path

from qguard_edge import VerifyRequest, choose_suites, convert, diff, request_for, verify

LIMIT = 8  # prompts per suite, and texts: enough to see that everything runs, too few for a verdict; None asks all


def main(model: str, out: Path) -> int:
    """Convert, compare, verify; returns the exit code of the verdict."""
    base = Path(model)
    if base.suffix != ".gguf":
        base = out.with_name(f"{out.stem}.base.gguf")
        convert(request_for(model, "f32", outfile=base, overwrite=True))

    report = convert(request_for(base, "q4_k", outfile=out, keep_plain=True, overwrite=True))
    for warning in report.warnings:
        print("warning:", warning)
    assert report.plain is not None  # for keep_plain
    print(f"{report.outfile.name}: defense {report.defense.label if report.defense else 'none'}, seed {report.seed}")

    found = diff(report.plain, report.outfile, base=base)
    print(f"{found.codes_changed} codes differ from {report.plain.name}; only code bits: {found.only_code_bits}")

    request = VerifyRequest(
        candidate=report.outfile, base=base, plain=report.plain, suites=choose_suites("injection"), limit=LIMIT
    )
    outcome = verify(request)
    print(f"{outcome.verdict}: {outcome.summary}")
    for check in outcome.checks:
        print(f"  {check.verdict:12} {check.id}: {check.reason}")
    return outcome.verdict.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "hardened.gguf")))
