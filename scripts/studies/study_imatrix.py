"""What an importance matrix underneath is worth to feedback: plain and feedback, on scales with one and without, in llama.cpp.

Run: python scripts/studies/study_imatrix.py BASE.gguf --texts INSTRUCTIONS.jsonl --work FOLDER --to q4_k,q4_0 --tokens 32768

BASE and INSTRUCTIONS as for `study_feedback.py`, whose documents and Gram matrices these are; `--shipped` measures on the text
that ships with the package instead. The importance matrix is the diagonal of the Gram matrices, damped as a conversion does it
(`--damping`). Prints Markdown; rows go to FOLDER/imatrix-rows.jsonl too.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from study_feedback import documents_of, judge, make_arm, row_of, show

from convert.ftypes import parse_file_type
from convert.gguf_file import GgufModel
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.conversion.activations import write_importance
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.learned.calibration_gguf import gguf_calibration
from qguard_edge.rounding.gguf import TensorRounding
from qguard_edge.runtimes.activations import LlamaGramSource
from qguard_edge.runtimes.grams import Grams, wanted_weights

HEAD = "| arm | KL, answers | KL, passages | same top | bits/weight | alignment | squared error | changed | s |"


def study(args: argparse.Namespace, base: GgufModel, grams: Grams, documents: list[list[list[int]]], to: str) -> None:
    """One file type: make the files, measure all in step, print a table."""
    files: dict[str, Path] = {}
    made: dict[str, tuple[TensorRounding, ...]] = {}
    seconds: dict[str, float] = {}
    for number, damping in enumerate(args.damping):
        imatrix = None
        if damping != "none":
            imatrix = args.work / "study.imatrix.gguf"
            write_importance(grams, imatrix, "study", args.tokens, float(damping))
        under = f", importance matrix damped by {damping}" if imatrix else ""
        options = QuantizeOptions(parse_file_type(to), threads=args.threads, imatrix=imatrix)
        if imatrix is None and options.file_type.needs_imatrix:
            continue
        plain = args.work / f"plain-{to}-{number}.gguf"
        plain.unlink(missing_ok=True)
        quantize(base.path, plain, options)
        for arm in ("plain", *args.arm):
            name, out = arm + under, args.work / f"arm-{to}-{len(files)}.gguf"
            out.unlink(missing_ok=True)
            started = time.process_time()
            files[name], made[name] = make_arm(arm, base, plain, out, grams, seed=args.seed, threads=args.threads)
            seconds[name] = time.process_time() - started
    found = judge(base.path, files, documents, args.threads)
    print(f"\n{to}\n\n{HEAD}\n|---|---|---|---|---|---|---|---|---|")
    for name in files:
        row = row_of(name, found[name], made[name], seconds[name])
        with (args.work / "imatrix-rows.jsonl").open("a", encoding="utf-8") as file:
            text = "shipped" if args.shipped else "matching"
            file.write(json.dumps({"to": to, "tokens": args.tokens, "text": text, "seed": args.seed, **asdict(row)}) + "\n")
        show(row)
    for path in files.values():
        path.unlink(missing_ok=True)


def main() -> None:
    """Measure the Gram matrices, then study type after type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--to", default="q4_k")
    parser.add_argument("--damping", nargs="+", default=["none", "0.03"], help="of the importance matrix; none: without one")
    parser.add_argument("--arm", action="append", default=None, help="beside plain; feedback if none is given")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--shipped", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.arm = args.arm or ["feedback"]
    args.work.mkdir(parents=True, exist_ok=True)
    base = GgufModel(args.base)
    seen, answers, passages = documents_of(base.path, args.texts.read_text(encoding="utf-8").splitlines(), args.tokens)
    name = f"grams-{args.tokens}"
    if args.shipped:
        seen = [list(row) for row in gguf_calibration(base.path, CalibrationOptions(samples=args.tokens // 256), 0).samples]
        name += "-shipped"
    source = LlamaGramSource(base)
    grams = source.collect(wanted_weights(base), seen, args.work / name, threads=args.threads)
    for to in args.to.split(","):
        study(args, base, grams, [answers, passages], to)


if __name__ == "__main__":
    main()
