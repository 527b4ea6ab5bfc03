"""Every file type: how near to full precision plain rounding and the default defense come, with the shipped text.

Run: python scripts/studies/study_types.py BASE.gguf --texts INSTRUCTIONS.jsonl --work FOLDER [--to q4_k,q6_k,...] [--seed 1]

BASE and INSTRUCTIONS as for scripts/studies/study_feedback.py, but the Gram matrices are measured on what `convert` takes by
default; the last rows of INSTRUCTIONS and half the drift suite's passages judge the files: 91 documents that no calibration
saw. Prints Markdown; FOLDER/types.jsonl keeps what is done, and a run goes on behind it.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from study_feedback import Judged, documents_of, judge, make_arm, row_of

from convert.ftypes import parse_file_type
from convert.gguf_file import GgufModel
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.learned.calibration_gguf import gguf_calibration
from qguard_edge.runtimes.activations import LlamaGramSource
from qguard_edge.runtimes.grams import wanted_weights

TYPES = "q4_k,q4_0,q6_k,q5_k,q8_0,q3_k_m,q2_k,iq4_xs,iq3_s,mxfp4"
ARMS = ("plain", "feedback")
JUDGED = Judged(answers=40, answer_tokens=64, passage_tokens=48)


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
        plain, out = args.work / f"{to}-plain.gguf", args.work / f"{to}-feedback.gguf"
        plain.unlink(missing_ok=True)
        quantize(base.path, plain, QuantizeOptions(parse_file_type(to), threads=args.threads))
        out.unlink(missing_ok=True)
        started = time.process_time()
        _, made = make_arm("feedback", base, plain, out, grams, seed=args.seed, threads=args.threads)
        seconds = time.process_time() - started
        found = judge(base.path, dict(zip(ARMS, (plain, out), strict=True)), (answers, passages), args.threads)
        for arm in ARMS:
            row = row_of(arm, found[arm], made if arm == "feedback" else (), seconds if arm == "feedback" else 0.0)
            done.append({"to": to, "mib": round(plain.stat().st_size / 2**20, 1), **asdict(row)})
        kept.write_text("".join(json.dumps(row) + "\n" for row in done), encoding="utf-8")
        plain.unlink()
        out.unlink()
    print("| type | MiB | plain, answers | feedback | ratio | plain, passages | feedback | ratio | bits/weight | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for plain_row, row in zip(done[::2], done[1::2], strict=True):
        kinds = []
        for kind in ("answers", "passages"):
            kinds += [f"{r[kind]:.4f} ± {r[f'{kind}_error']:.4f}" for r in (plain_row, row)]
            kinds.append(f"{row[kind] / plain_row[kind]:.2f}")
        print(f"| {row['to']} | {row['mib']} | {' | '.join(kinds)} | {row['bits']:.2f} | {row['seconds']:.0f} |")


if __name__ == "__main__":
    main()
