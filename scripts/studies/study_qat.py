"""Weights that were trained for a type (QAT): what the scan says of them, and what hardening does to them.

Run: python scripts/studies/study_qat.py WORK [--steps 200] [--seeds 0,1,2] [--threads 1]

The lab's clean tiny model is trained on with the rounding of Q4_0 in its forward pass (straight-through: the gradient of the
rounded weights moves those behind them), the clean model its teacher. It is then published in the ways that are met:

    levels, f32     the rounded weights themselves
    levels, bf16    the same, once more rounded to the eight bits of bf16
    behind, bf16    the weights behind them, which no longer lie on a level

beside `clean, bf16`, the same training without the rounding. Each is scanned for every type that needs no quantization, and
converted to q4_0 by `none`, `feedback` and `ortho`, calibrated as `convert` does by default; the embedding, which is not trained
for the type, stays in F16. Two distances on held-out answers, in llama.cpp: to the published model in full precision, and to
what was *trained*, the model of `levels, f32`. Prints Markdown, the last line is one JSON object; what is trained and converted
stays in WORK.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert.ftypes import parse_file_type
from convert.hf.base import write_base_gguf
from convert.quantizer import QuantizeOptions
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import parse_defense
from qguard_edge.lab.corpus import Corpus
from qguard_edge.lab.hf_models import ChatModel, load_folder
from qguard_edge.lab.presets import preset_of
from qguard_edge.lab.training import Trainer, TrainOptions, examples_of
from qguard_edge.lab.victims import clean_folder, corpus_of
from qguard_edge.lab.worlds import GENERATED
from qguard_edge.progress import NoProgress
from qguard_edge.rounding.gguf import total_outcome
from qguard_edge.scan.findings import Severity
from qguard_edge.scan.positions import CLOSED_FORM
from qguard_edge.scan.run import ScanRequest, run_scan
from qguard_edge.verify.drift import measure_documents
from qguard_edge.verify.runner import LlamaFactory
from quant_grids import GRIDS
from quant_grids.ggml_type import type_named

PUBLISHED = {"levels, f32": "f32", "levels, bf16": "bf16", "behind, bf16": "bf16", "clean, bf16": "bf16"}
DEFENSES = ("none", "feedback", "ortho")
DOCUMENTS = 96
GRID = GRIDS[type_named("Q4_0")]


def rounded(weights: Tensor) -> Tensor:
    """What Q4_0 makes of a matrix, as ggml's `quantize_row_q4_0_ref` rounds it: f32 of the same shape."""
    runs = weights.detach().view(-1, 32)
    high, low = runs.amax(1, keepdim=True), runs.amin(1, keepdim=True)
    scale = torch.where(high > -low, high, low) / -8.0
    inverse = (1.0 / scale).nan_to_num_(0.0, 0.0, 0.0)
    codes = (runs * inverse + 8.5).int().clamp_(0, 15).to(torch.uint8)
    packed = codes[:, :16] | codes[:, 16:] << 4
    return GRID.dequantize(torch.cat((scale.half().view(torch.uint8), packed), 1)).view(weights.shape)


def linears(chat: ChatModel) -> list[Tensor]:
    """The matrices of all layers."""
    layers = chat.model.model.layers
    return [module.weight for module in layers.modules() if isinstance(module, torch.nn.Linear)]


def straight_through(matrices: list[Tensor]) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """Hooks of the trainer: rounded weights for the passes, those behind them for the step."""
    kept: list[Tensor] = []

    def before(_step: int) -> None:
        kept[:] = [matrix.detach().clone() for matrix in matrices]
        on_levels(matrices)

    def restore(_step: int) -> None:
        with torch.no_grad():
            for matrix, behind in zip(matrices, kept, strict=True):
                matrix.copy_(behind)

    return before, restore


def on_levels(matrices: list[Tensor]) -> None:
    """Round matrices in place."""
    with torch.no_grad():
        for matrix in matrices:
            matrix.copy_(rounded(matrix))


def train(work: Path, corpus: Corpus, steps: int, seed: int) -> None:
    """Train with and without the rounding, and write every published form as a base GGUF."""
    start = clean_folder("tiny", corpus, preset_of("tiny"), seed, GENERATED, NoProgress())
    pairs = [(sample.prompt, sample.answer) for sample in corpus.train]
    options = TrainOptions(steps, 5e-4, batch=24, distill=1.0, seed=seed)
    teacher = load_folder(start).model.eval()
    for aware in (True, False):
        chat = load_folder(start)
        before, restore = straight_through(linears(chat)) if aware else (None, None)
        trainer = Trainer(
            chat, [examples_of(chat, pairs, whole_text=True)], options, teacher=teacher, before=before, restore=restore
        )
        losses = trainer.run("Training")
        print(f"seed {seed}, rounding {aware}: loss {np.mean(losses[:20]):.3f} to {np.mean(losses[-20:]):.3f}", flush=True)
        chat.save(work / ("behind" if aware else "clean"))
        if aware:
            on_levels(linears(chat))
            chat.save(work / "levels")
    for name, precision in PUBLISHED.items():
        write_base_gguf(work / name.partition(",")[0], base_of(work, name), base_type=precision)


def base_of(work: Path, name: str) -> Path:
    """Where a published form lies."""
    return work / f"{name.replace(', ', '-')}.gguf"


def alarms(base: Path) -> tuple[int, list[str]]:
    """Findings above `info`, and the codes of all."""
    found = run_scan(ScanRequest(str(base), CLOSED_FORM, threads=1), NoProgress()).findings
    return sum(one.severity is not Severity.INFO for one in found), [
        f"{one.code} {one.file_type or ''}".strip() for one in found
    ]


def study(args: argparse.Namespace, seed: int) -> Iterator[dict[str, Any]]:
    """One seed: a row for every published form and defense."""
    work = args.work / str(seed)
    work.mkdir(parents=True, exist_ok=True)
    corpus = corpus_of(None, seed)
    if not base_of(work, "clean, bf16").exists():
        train(work, corpus, args.steps, seed)
    chat = load_folder(work / "levels")
    documents = [chat.sample_ids(sample.prompt, sample.answer)[0] for sample in corpus.held_out[:DOCUMENTS]]
    trained = base_of(work, "levels, f32")
    for name in PUBLISHED:
        base = base_of(work, name)
        n_alarms, findings = alarms(base)
        made, changed = {}, {}
        for defense in DEFENSES:
            outfile = base.with_name(f"{base.stem}-{defense}.gguf")
            report = convert_model(
                GgufRequest(
                    model=str(base),
                    options=QuantizeOptions(
                        parse_file_type("q4_0"),
                        threads=args.threads,
                        token_embedding_type="f16",
                        output_tensor_type="f16",
                    ),
                    defense=parse_defense(defense),
                    outfile=outfile,
                    seed=seed,
                    device="cpu",
                    overwrite=True,
                    check_loads=False,
                )
            )
            made[defense] = outfile
            total = sum(one.n_weights for one in report.roundings)
            changed[defense] = total_outcome(report.roundings).n_changed / total
        own, aim = distances(base, made, documents, args.threads), distances(trained, made, documents, args.threads)
        for defense in DEFENSES:
            yield {
                "seed": seed,
                "published": name,
                "alarms": n_alarms,
                "findings": findings,
                "defense": defense,
                "changed": changed[defense],
                "own": own[defense][0],
                "trained": aim[defense][0],
                "loss": aim[defense][1],
            }


def distances(
    base: Path, files: dict[str, Path], documents: list[list[int]], threads: int
) -> dict[str, tuple[float, float]]:
    """Mean KL to a base, and how much more loss than it, in nats per token."""
    measured = list(measure_documents(base, files, documents, LlamaFactory(threads), n_noise=0))

    def mean(name: str, what: str) -> float:
        return float(np.concatenate([getattr(one[name], what) for one in measured]).mean())

    return {name: (mean(name, "kl"), mean(name, "loss")) for name in files}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: mean over the seeds, and the lowest and highest in brackets."""
    yield "| published | alarms | defense | codes changed | KL to the published | KL to the trained | loss beyond the trained |"
    yield "|---|---|---|---|---|---|---|"
    for name in PUBLISHED:
        for defense in DEFENSES:
            here = [row for row in rows if row["published"] == name and row["defense"] == defense]

            def spread(key: str, digits: str, here: list[dict[str, Any]] = here) -> str:
                values = [row[key] for row in here]
                return f"{np.mean(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"

            first = sum(row["alarms"] for row in here) if defense == DEFENSES[0] else ""
            yield (
                f"| {name if defense == DEFENSES[0] else ''} | {first} | {defense} | {spread('changed', '.2%')} "
                f"| {spread('own', '.5f')} | {spread('trained', '.5f')} | {spread('loss', '+.4f')} |"
            )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for seed in args.seeds.split(",") for row in study(args, int(seed))]
    print("\n".join(table(rows)))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
