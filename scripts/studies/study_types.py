"""Every file type: how near to full precision plain rounding and error feedback come, importance matrix underneath or not.

Run: python scripts/studies/study_types.py BASE.gguf --texts INSTRUCTIONS.jsonl --work FOLDER [--to q4_k,q6_k,...] [--seed 1]
     python scripts/studies/study_types.py BASE.gguf --folder BASE ... --to nf4,fp4,int8    # bitsandbytes, in transformers
     python scripts/studies/study_types.py --table types.jsonl                              # print again

BASE and INSTRUCTIONS as for scripts/studies/study_feedback.py, but the Gram matrices are measured on what `convert` takes by
default, and the importance matrix is their diagonal, damped as `convert` damps it; the last rows of INSTRUCTIONS and half the
drift suite's passages judge the files: 91 documents that no calibration saw. Prints Markdown; FOLDER/types.jsonl keeps what is
done, and a run goes on behind it.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_feedback import Judged, documents_of, judge, make_arm, row_of
from torch import Tensor

from convert.ftypes import parse_file_type
from convert.gguf_file import GgufModel
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.conversion.activations import write_importance
from qguard_edge.conversion.request import FolderRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import parse_defense
from qguard_edge.lab.hf_models import load_folder
from qguard_edge.learned.calibration import CalibrationOptions
from qguard_edge.learned.calibration_gguf import gguf_calibration
from qguard_edge.rounding.gguf import TensorRounding, total_outcome
from qguard_edge.runtimes.activations import LlamaGramSource
from qguard_edge.runtimes.bnb import load_exactly
from qguard_edge.runtimes.grams import Grams, wanted_weights

TYPES = "q4_k,q4_0,q6_k,q5_k,q8_0,q3_k_m,q2_k,iq4_xs,iq3_s"
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


def study_folder(args: argparse.Namespace, documents: list[list[list[int]]], to: str) -> list[dict[str, Any]]:
    """One bitsandbytes format: make the two folders, measure them in transformers."""
    full = load_folder(args.folder).model
    wanted = [[log_probs(full, ids) for ids in kind] for kind in documents]
    rows = []
    for arm in ARMS[::2]:
        started = time.process_time()
        made = convert_model(
            FolderRequest(
                model=str(args.folder),
                to=to,
                defense=parse_defense("none" if arm == "plain" else arm),
                outfile=str(args.work / f"{to}-{arm}"),
                device="cpu",
                seed=args.seed,
                threads=args.threads,
                overwrite=True,
                check_loads=False,
            )
        )
        seconds = time.process_time() - started
        model = load_exactly(made.outfile)
        means, errors = [], []
        for kind, fulls in zip(documents, wanted, strict=True):
            kl = [float((p.exp() * (p - log_probs(model, ids))).sum(1).mean()) for ids, p in zip(kind, fulls, strict=True)]
            means.append(float(np.mean(kl)))
            errors.append(float(np.std(kl) / len(kl) ** 0.5))
        total = total_outcome(made.roundings)
        shutil.rmtree(made.outfile)
        rows.append(
            {
                "to": to,
                "mib": round(made.out_bytes / 2**20, 1),
                "arm": arm,
                "answers": means[0],
                "answers_error": errors[0],
                "passages": means[1],
                "passages_error": errors[1],
                "bits": made.entropy_bits / max(1, sum(rounding.n_weights for rounding in made.roundings)),
                "alignment": total.alignment if made.roundings else 1.0,
                "seconds": seconds,
            }
        )
    return rows


def log_probs(model: Any, ids: Sequence[int]) -> Tensor:
    """f32 `[tokens - 1, vocabulary]`."""
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([list(ids[:-1])])).logits[0].float()
        return logits.log_softmax(1)


def table(done: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: KL of each arm by type and kind of text, feedback's over plain's beside it."""
    yield "| type | MiB | text | " + " | ".join(ARMS) + " | feedback / plain | bits/weight | alignment | s |"
    yield "|---" * (len(ARMS) + 7) + "|"
    for to in dict.fromkeys(row["to"] for row in done):
        rows = {row["arm"]: row for row in done if row["to"] == to}
        plain, made = rows["plain"], rows["feedback"]
        for kind in ("answers", "passages"):
            cells = [to, str(plain["mib"]), kind]
            cells += [f"{rows[a][kind]:.4f} ± {rows[a][f'{kind}_error']:.4f}" if a in rows else "-" for a in ARMS]
            cells += [f"**{made[kind] / plain[kind]:.2f}**", f"{made['bits']:.2f}", f"{made['alignment']:+.2f}"]
            yield f"| {' | '.join(cells)} | {made['seconds']:.0f} |"


def main() -> None:
    """Measure type after type, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("--folder", type=Path, help="the base as a folder, for bitsandbytes")
    parser.add_argument("--table", type=Path, help="print the table of such a file")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--to", default=TYPES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.table:
        print("\n".join(table([json.loads(line) for line in args.table.read_text(encoding="utf-8").splitlines()])))
        return
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    base = GgufModel(args.base)
    _, answers, passages = documents_of(base.path, args.texts.read_text(encoding="utf-8").splitlines(), 100, JUDGED)
    kept = args.work / "types.jsonl"
    done = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.exists() else []
    for to in args.to.split(","):
        if any(row["to"] == to for row in done):
            continue
        if args.folder:
            done += study_folder(args, [answers, passages], to)
        else:
            text = gguf_calibration(base.path, CalibrationOptions(), 0).samples
            source = LlamaGramSource(base)
            grams = source.collect(wanted_weights(base), text, args.work / "grams", threads=args.threads)
            done += study(args, base, grams, [answers, passages], to)
        kept.write_text("".join(json.dumps(row) + "\n" for row in done), encoding="utf-8")
    print("\n".join(table(done)))


if __name__ == "__main__":
    main()
