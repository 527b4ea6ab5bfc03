"""How near to full precision error feedback comes, by its options: mean KL in llama.cpp on answers and on unlike passages.

Run: python scripts/studies/study_feedback.py BASE.gguf --texts INSTRUCTIONS.jsonl --work FOLDER --to q4_k --tokens 8192 ARM ...

BASE is full precision, for instance rotated SmolLM2:
    python -m qguard_edge.lab.rotated FOLDER && python -m qguard_edge convert FOLDER --to bf16 -o BASE.gguf
INSTRUCTIONS has one object a line with `instruction`, `input` and `output`. The first rows, in the model's chat template, are
what the Gram matrices are measured on (in llama.cpp); the last rows and half the drift suite's passages judge the files.

An ARM is `plain`, `ortho`, a file type (`q5_k`: plain rounding to that type), or `feedback` with options and tuning:
`feedback:alignment=0:width=0.5:order=random:reach=0:damping=0.01`. Prints Markdown; rows go to FOLDER/rows.jsonl too.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile, GgufModel
from convert.patch import GgufPatch
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.defenses.base import Inputs, make_defense
from qguard_edge.defenses.feedback import Feedback, Tuning
from qguard_edge.defenses.options import parse_defense
from qguard_edge.rounding.gguf import TensorRounding, WalkOptions, coverage_of, harden
from qguard_edge.runtimes.activations import LlamaGramSource
from qguard_edge.runtimes.grams import wanted_weights
from qguard_edge.runtimes.llama import LlamaModel
from qguard_edge.verify.chat import render, template_of
from qguard_edge.verify.drift import DocumentDrift, measure_documents
from qguard_edge.verify.runner import LlamaFactory
from qguard_edge.verify.suites.base import SuitePrompt
from qguard_edge.verify.verifier import built_in_texts

ANSWERS, ANSWER_TOKENS, PASSAGE_TOKENS, ROW_TOKENS = 24, 160, 64, 512


@dataclass(frozen=True)
class Row:
    """One arm: its distance to full precision, and how it got there; shares and bits per weight."""

    arm: str
    answers: float
    answers_error: float
    passages: float
    passages_error: float
    same_top: float
    bits: float
    alignment: float
    energy: float
    changed: float
    seconds: float


def chats(base: Path, lines: Sequence[str]) -> list[str]:
    """Conversations of one question and its answer, in the model's template."""
    rows = [json.loads(line) for line in lines]
    template = template_of(GgufFile(base))
    if template is None:
        raise SystemExit(f"{base.name} has no chat template")
    prompts = [SuitePrompt(str(i), "\n".join(filter(None, (r["instruction"], r.get("input"))))) for i, r in enumerate(rows)]
    return [head + row["output"] for head, row in zip(render(template, prompts), rows, strict=True)]


@dataclass(frozen=True)
class Judged:
    """How much text judges the files: answers, and tokens of an answer and of a passage at most."""

    answers: int = ANSWERS
    answer_tokens: int = ANSWER_TOKENS
    passage_tokens: int = PASSAGE_TOKENS


def documents_of(
    base: Path, lines: Sequence[str], tokens: int, judged: Judged = Judged()
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Token ids to measure Gram matrices on, and to judge files by: answers and passages."""
    with LlamaModel(base, vocab_only=True) as model:
        seen, total = list[list[int]](), 0
        for text in chats(base, lines[: tokens // 20]):
            if total >= tokens:
                break
            seen.append(model.tokenize(text)[: min(ROW_TOKENS, tokens - total)])
            total += len(seen[-1])
        answers = [model.tokenize(text)[: judged.answer_tokens + 1] for text in chats(base, lines[-judged.answers :])]
        passages = [model.tokenize(text, add_special=True)[: judged.passage_tokens + 1] for text in built_in_texts()[::2]]
    return seen, answers, passages


def make_arm(
    arm: str, base: GgufModel, plain: Path, out: Path, inputs: Inputs, *, seed: int, threads: int
) -> tuple[Path, tuple[TensorRounding, ...]]:
    """Write the file of an arm."""
    if arm == "plain":
        return plain, ()
    if not arm.startswith(("feedback", "ortho")):
        quantize(base.path, out, QuantizeOptions(parse_file_type(arm), threads=threads))
        return out, ()
    name, *settings = arm.split(":")
    tuned: dict[str, Any] = {}
    for setting in list(settings):
        key, _, value = setting.partition("=")
        if key in {item.name for item in fields(Tuning)}:
            settings.remove(setting)
            tuned[key] = {"order": str, "damping": float}.get(key, int)(value)
    defense = make_defense(parse_defense(":".join([name, *settings])))
    if isinstance(defense, Feedback):
        defense.tuning = Tuning(**tuned)
    opened = GgufFile(plain)
    tensors = coverage_of(base, opened).protected
    patch = GgufPatch(opened, out, {})
    try:
        made = harden(base, opened, tensors, defense, WalkOptions(seed, threads, inputs=inputs), sink=patch.write_rows)
        patch.copy_rest(tensor.name for tensor in tensors)
    finally:
        patch.close()
    return out, made


def judge(
    base: Path, files: Mapping[str, Path], documents: Sequence[list[list[int]]], threads: int
) -> dict[str, list[list[DocumentDrift]]]:
    """Measure all files in step: per file, per kind of document, what was found on each document."""
    found: dict[str, list[list[DocumentDrift]]] = {arm: [] for arm in files}
    for texts in documents:
        measured = list(measure_documents(base, files, texts, LlamaFactory(threads), n_noise=0))
        for arm, kinds in found.items():
            kinds.append([one[arm] for one in measured])
    return found


def row_of(arm: str, drifts: list[list[DocumentDrift]], made: tuple[TensorRounding, ...], seconds: float) -> Row:
    """Sum up an arm."""
    means = [float(np.concatenate([part.kl for part in kind]).mean()) for kind in drifts]
    errors = [float(np.std([part.kl.mean() for part in kind]) / len(kind) ** 0.5) for kind in drifts]
    weights = max(1, sum(rounding.n_weights for rounding in made))
    outcomes = [rounding.outcome for rounding in made]
    energy = sum(outcome.energy for outcome in outcomes)
    return Row(
        arm,
        means[0],
        errors[0],
        means[1],
        errors[1],
        float(np.concatenate([part.same for kind in drifts for part in kind]).mean()),
        sum(rounding.bits for rounding in made) / weights,
        sum(outcome.projection for outcome in outcomes) / energy if made else 1.0,
        sum(outcome.new_energy for outcome in outcomes) / energy if made else 1.0,
        sum(outcome.n_changed for outcome in outcomes) / weights,
        seconds,
    )


def show(row: Row) -> None:
    """Print one line of the table."""
    print(
        f"| {row.arm} | {row.answers:.4f} ± {row.answers_error:.4f} | {row.passages:.4f} ± {row.passages_error:.4f} "
        f"| {row.same_top:.1%} | {row.bits:.3f} | {row.alignment:+.3f} | {row.energy:.2f} | {row.changed:.1%} "
        f"| {row.seconds:.0f} |"
    )


def main() -> None:
    """Make every arm's file, measure all of them, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--to", default="q4_k")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    base = GgufModel(args.base)
    plain = args.work / f"plain-{args.to}.gguf"
    if not plain.exists():
        quantize(base.path, plain, QuantizeOptions(parse_file_type(args.to), threads=args.threads))
    lines = args.texts.read_text(encoding="utf-8").splitlines()
    seen, answers, passages = documents_of(base.path, lines, args.tokens)
    grams = LlamaGramSource(base).collect(
        wanted_weights(base), seen, args.work / f"grams-{args.tokens}", threads=args.threads
    )
    files: dict[str, Path] = {}
    made: dict[str, tuple[TensorRounding, ...]] = {}
    seconds: dict[str, float] = {}
    for number, arm in enumerate(args.arms):
        out = args.work / f"arm-{args.to}-{number}.gguf"
        out.unlink(missing_ok=True)
        started = time.process_time()
        files[arm], made[arm] = make_arm(arm, base, plain, out, grams, seed=args.seed, threads=args.threads)
        seconds[arm] = time.process_time() - started
    found = judge(base.path, files, (answers, passages), args.threads)
    print("| arm | KL, answers | KL, passages | same top | bits/weight | alignment | squared error | changed | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for arm in args.arms:
        row = row_of(arm, found[arm], made[arm], seconds[arm])
        with (args.work / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"to": args.to, "tokens": args.tokens, **asdict(row)}) + "\n")
        show(row)


if __name__ == "__main__":
    main()
