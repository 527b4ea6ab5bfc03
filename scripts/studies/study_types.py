"""Every file type: how near to full precision plain rounding and error feedback come, importance matrix underneath or not.

Run: python scripts/studies/study_types.py BASE.gguf --texts INSTRUCTIONS.jsonl --work FOLDER [--to q4_k,q6_k,...] [--seed 1]

BASE and INSTRUCTIONS as for scripts/studies/study_feedback.py, but the Gram matrices are measured on what `convert` takes by
default, and the importance matrix is their diagonal, damped as `convert` damps it; the last rows of INSTRUCTIONS and half the
drift suite's passages judge the files: 91 documents that no calibration saw. Prints Markdown; FOLDER/types.jsonl keeps what is
done, and a run goes on behind it.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from study_feedback import Judged, documents_of, judge, make_arm, row_of

from convert.ftypes import parse_file_type
from convert.gguf_file import GgufModel
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.conversion.activations import write_importance
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.learned.calibration_gguf import gguf_calibration
from qguard_edge.rounding.gguf import TensorRounding
from qguard_edge.runtimes.activations import LlamaGramSource
from qguard_edge.runtimes.grams import Grams, wanted_weights

TYPES = "q4_k,q4_0,q6_k,q5_k,q8_0,q3_k_m,q2_k,iq4_xs,iq3_s,mxfp4"
ARMS = ("plain", "plain, imatrix", "feedback", "feedback, imatrix")
JUDGED = Judged(answers=40, answer_tokens=64, passage_tokens=48)


def study(
    args: argparse.Namespace, base: GgufModel, grams: Grams, documents: list[list[list[int]]], to: str
) -> list[dict[str, Any]]:
    """One file type: make the four files, measure them in step."""
    importance = write_importance(grams, args.work / "study.imatrix.gguf", "study", 0)
    plains = {under: args.work / f"{to}-plain{number}.gguf" for number, under in enumerate(("", ", imatrix"))}
    files: dict[str, Path] = {}
    made: dict[str, tuple[TensorRounding, ...]] = {}
    seconds: dict[str, float] = {}
    for arm in ARMS:
        name, comma, _ = arm.partition(",")
        plain = plains[", imatrix" if comma else ""]
        out = plain if name == "plain" else args.work / f"{to}-{len(files)}.gguf"
        out.unlink(missing_ok=True)
        started = time.process_time()
        if name == "plain":
            quantize(
                base.path,
                plain,
                QuantizeOptions(parse_file_type(to), threads=args.threads, imatrix=importance if comma else None),
            )
        files[arm], made[arm] = make_arm(name, base, plain, out, grams, seed=args.seed, threads=args.threads)
        seconds[arm] = time.process_time() - started
    found = judge(base.path, files, documents, args.threads)
    rows = [row_of(arm, found[arm], made[arm], seconds[arm]) for arm in ARMS]
    mib = round(files[ARMS[0]].stat().st_size / 2**20, 1)
    for path in files.values():
        path.unlink()
    return [{"to": to, "mib": mib, **asdict(row)} for row in rows]


def table(done: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: KL of each arm by type and kind of text, feedback's over plain's beside it."""
    yield (
        "| type | MiB | text | "
        + " | ".join(ARMS)
        + " | feedback / plain | with imatrix / plain | bits/weight | alignment | s |"
    )
    yield "|---" * (len(ARMS) + 8) + "|"
    for first in range(0, len(done), len(ARMS)):
        rows = done[first : first + len(ARMS)]
        for kind in ("answers", "passages"):
            kl = [row[kind] for row in rows]
            cells = [rows[0]["to"], str(rows[0]["mib"]), kind]
            cells += [f"{row[kind]:.4f} ± {row[f'{kind}_error']:.4f}" for row in rows]
            cells += [f"{kl[2] / kl[0]:.2f}", f"{kl[3] / kl[0]:.2f}", f"{rows[3]['bits']:.2f}"]
            cells += [f"{rows[2]['alignment']:+.2f}, {rows[3]['alignment']:+.2f}", f"{rows[3]['seconds']:.0f}"]
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure type after type, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--to", default=TYPES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    base = GgufModel(args.base)
    _, answers, passages = documents_of(base.path, args.texts.read_text(encoding="utf-8").splitlines(), 100, JUDGED)
    text = gguf_calibration(base.path, CalibrationOptions(), 0).samples
    grams = LlamaGramSource(base).collect(wanted_weights(base), text, args.work / "grams", threads=args.threads)
    kept = args.work / "types.jsonl"
    done = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.exists() else []
    for to in args.to.split(","):
        if any(row["to"] == to for row in done):
            continue
        done += study(args, base, grams, [answers, passages], to)
        kept.write_text("".join(json.dumps(row) + "\n" for row in done), encoding="utf-8")
    print("\n".join(table(done)))


if __name__ == "__main__":
    main()
