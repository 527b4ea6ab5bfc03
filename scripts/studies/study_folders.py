"""Folders for bitsandbytes of a clean model, with every defense: do they load, and what do they cost?

Run: python scripts/studies/study_folders.py --victim smollm2 --threads 1 --out docs/results/folders.json

For each of NF4, FP4 and INT8 and each defense: convert the lab's clean model (quantguard learns on texts of the lab's
corpus, the others look at none), load the folder in transformers and let it write eight tokens (the conversion's own check),
then mean KL to full precision on held-out answers and on prose of another kind. Attack success on backdoored models is the
lab's (`qguard-edge lab run --attack elq`). An interrupted study goes on after its last finished row. Markdown on standard
output; the last line is one JSON object.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qguard_edge.conversion.report import FolderReport
from qguard_edge.conversion.request import FolderRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import options_class
from qguard_edge.lab import bnb
from qguard_edge.lab.corpus import Corpus, make_corpus
from qguard_edge.lab.evaluation import Distributions, compare, make_held_out
from qguard_edge.lab.hf_models import ChatModel, load_folder
from qguard_edge.lab.presets import preset_of
from qguard_edge.lab.scenarios import make_scenario
from qguard_edge.lab.victims import clean_folder
from qguard_edge.lab.worlds import GENERATED
from qguard_edge.learned.calibration import CalibrationOptions, write_pairs
from qguard_edge.progress import NoProgress
from qguard_edge.rounding.gguf import total_outcome
from qguard_edge.runtimes.bnb import load_exactly
from qguard_edge.runtimes.devices import torch_threads
from qguard_edge.runtimes.fidelity import DEFAULT_TEXT

DEFENSES = ("none", "ortho", "flipguard", "qvec", "noise", "quantguard")
Texts = list[tuple[list[int], int]]


@dataclass(frozen=True)
class Row:
    """One folder: what it cost and how near it is to full precision."""

    victim: str
    kind: str
    defense: str
    kl: float
    kl_prose: float
    same_top: float
    perplexity_ratio: float
    flipped: float
    alignment: float
    seconds: float
    megabytes: float
    loaded: bool


def text_of(corpus: Corpus, path: Path, count: int) -> Path:
    """Calibration text: training samples of the clean model."""
    return write_pairs(path, ((sample.prompt, sample.answer) for sample in corpus.train[:count]))


def held_out(chat: ChatModel, corpus: Corpus, count: int) -> tuple[Texts, Texts]:
    """Held-out answers, and prose: token ids and the length of what is not measured."""
    held_out = make_held_out(chat, make_scenario("injection", corpus), 1, count, 8)
    ids = chat.tokenizer(DEFAULT_TEXT.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    prose = [(ids[start : start + 128], 1) for start in range(0, len(ids), 128)]
    return [(list(row), n) for row, n in held_out.texts], prose


def measure(model: Any, texts: tuple[Texts, Texts]) -> tuple[Distributions, Distributions]:
    """Next-token distributions on both."""
    return bnb.distributions(model, texts[0]), bnb.distributions(model, texts[1])


def row_of(victim: str, report: FolderReport, full: tuple[Distributions, ...], found: tuple[Distributions, ...]) -> Row:
    """Join a conversion with what was measured on its folder."""
    near, prose = (compare(a, b) for a, b in zip(full, found, strict=True))
    weights = sum(rounding.n_weights for rounding in report.roundings)
    total = total_outcome(report.roundings)
    assert report.defense is not None
    return Row(
        victim,
        report.kinds[0],
        report.defense.name,
        near.mean_kl,
        prose.mean_kl,
        near.same_top,
        near.perplexity_ratio,
        total.n_changed / weights,
        total.alignment,
        sum(report.seconds.values()),
        report.out_bytes / 1e6,
        report.loaded is not None,
    )


def markdown(rows: list[Row]) -> str:
    """The table."""
    lines = ["| model | format | defense | mean KL | on prose | same top | perplexity | flipped | alignment | MB | s |"]
    lines += ["|---" * 11 + "|"]
    lines += [
        f"| {row.victim} | {row.kind} | {row.defense} | {row.kl:.4f} | {row.kl_prose:.4f} | {row.same_top:.1%} "
        f"| x{row.perplexity_ratio:.3f} | {row.flipped:.1%} | {row.alignment:.2f} | {row.megabytes:.0f} | {row.seconds:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victim", default="smollm2", help="tiny or smollm2")
    parser.add_argument("--kinds", default=",".join(bnb.KINDS))
    parser.add_argument("--defenses", default=",".join(DEFENSES))
    parser.add_argument("--texts", type=int, default=48, help="held-out texts")
    parser.add_argument("--samples", type=int, default=64, help="calibration texts of quantguard")
    parser.add_argument("--steps", type=int, default=0, help="steps of quantguard; 0: its start alone, error feedback")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file with the rows")
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text())["rows"] if arguments.out and arguments.out.is_file() else []
    rows = [Row(**row) for row in known]
    done = {(row.victim, row.kind, row.defense) for row in rows}
    corpus = make_corpus(0)
    with tempfile.TemporaryDirectory() as name, torch_threads(arguments.threads):
        work = Path(name)
        folder = clean_folder(arguments.victim, corpus, preset_of(arguments.victim), 0, GENERATED, NoProgress())
        chat = load_folder(folder)
        texts = held_out(chat, corpus, arguments.texts)
        full = measure(chat.model, texts)
        calibration = CalibrationOptions(text_of(corpus, work / "text.jsonl", arguments.samples), arguments.samples, 136)
        for kind in arguments.kinds.split(","):
            for defense in arguments.defenses.split(","):
                if (arguments.victim, kind, defense) in done:
                    continue
                options = options_class(defense)(**({"steps": arguments.steps} if defense == "quantguard" else {}))
                request = FolderRequest(
                    model=str(folder),
                    to=kind,
                    defense=options,
                    outfile=str(work / "made"),
                    device="cpu",
                    seed=0,
                    threads=arguments.threads,
                    overwrite=True,
                    calibration=calibration,
                )
                report = convert_model(request)
                found = measure(load_exactly(report.outfile), texts)
                rows.append(row_of(arguments.victim, report, full, found))
                if arguments.out:
                    document = {"settings": {"samples": arguments.samples, "steps": arguments.steps}}
                    document["rows"] = [asdict(row) for row in rows]  # type: ignore[assignment]
                    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(markdown(rows))
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
