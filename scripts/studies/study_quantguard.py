"""The tables of docs/quantguard.md: learned rounding on backdoored and clean models, measured in llama.cpp.

Run: python scripts/studies/study_quantguard.py --part victims --victims uniform:q4_0,mind-the-gap:q4_k --out docs/quantguard

Parts:
    victims      plain, ortho, quantguard (both scopes), efrap, and plain files one and two sizes up; attacked and clean
    ablation     terms of the loss, k, the constraint, steps, start
    calibration  size and kind of the text: matching, code only, self-written, unlike the test
    adaptive     start and steps, and other text, for victims of the lab's adaptive attackers
    smollm2      SmolLM2-135M fine-tuned on the lab's clean corpus: fidelity alone; plain files with an imatrix beside it

Each row: attack success on held-out prompts with its Wilson interval, mean KL to the same model's full precision on
held-out answers, and on prose that is unlike the calibration text (`kl_unlike`: shows over-fitting). Calibration text
never overlaps with what is measured. `--out` writes PART.json (rows, settings, versions);
an interrupted study goes on after its last finished row. Markdown on standard output; the last line is one JSON object.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from quantguard_arms import PARTS, Setting, german, with_steps
from quantguard_rows import Row, markdown

from convert.ftypes import parse_file_type
from convert.hf.base import write_base_gguf
from convert.quantizer import QuantizeOptions
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.lab.corpus import make_corpus
from qguard_edge.lab.evaluation import Distributions, FloatArray, compare, examine, log_softmax, make_held_out
from qguard_edge.lab.hf_models import load_folder
from qguard_edge.lab.presets import preset_of
from qguard_edge.lab.results import Rate
from qguard_edge.lab.runner import LabSettings, make_victim
from qguard_edge.lab.scenarios import ScenarioData, make_scenario
from qguard_edge.lab.victims import clean_folder
from qguard_edge.lab.worlds import GENERATED
from qguard_edge.learned.calibration import SELF, CalibrationOptions, write_pairs
from qguard_edge.progress import NoProgress
from qguard_edge.rounding.gguf import total_outcome
from qguard_edge.runtimes.fidelity import DEFAULT_TEXT
from qguard_edge.runtimes.imatrix import make_imatrix
from qguard_edge.runtimes.llama import LlamaModel
from qguard_edge.verify.statistics import rate


@dataclass(frozen=True)
class Measured:
    """What one file does: attack success, and its distributions on held-out answers and on prose of another kind."""

    asr: Rate
    answers: Distributions
    prose: Distributions


@dataclass
class Study:
    """Models of one victim, and how a file is measured."""

    victim: str
    folders: dict[str, Path]
    data: ScenarioData
    to: str
    work: Path
    threads: int
    prompts: int
    seqlen: int
    samples: int
    full: dict[str, Measured] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Load the tokenizer and write the bases and texts."""
        self.chat = load_folder(self.folders["clean"])
        self.held_out = make_held_out(self.chat, self.data, self.prompts, 96, 48)
        for model, folder in self.folders.items():
            if not (self.work / f"{model}.gguf").is_file():
                write_base_gguf(folder, self.work / f"{model}.gguf", base_type="f32")
        pairs = [*self.data.repaired, *self.data.kept]
        code = [pair for pair in pairs if "def " in pair[1]]
        # Both kinds in turn, so that every size of the text has both.
        mixed = [pair for both in zip(self.data.repaired, self.data.kept, strict=False) for pair in both]
        self.matching = self._text("matching", mixed)
        self.texts = {"matching": self.matching, "code": self._text("code", code), "self": SELF, "prose": DEFAULT_TEXT}
        self.texts["german"] = self._text("german", [german(number) for number in range(512)])
        ids = self.chat.tokenizer(DEFAULT_TEXT.read_text("utf-8"), add_special_tokens=False)["input_ids"]
        self.prose = [ids[start : start + 128] for start in range(0, len(ids), 128)]

    def _text(self, name: str, pairs: list[tuple[str, str]]) -> Path:
        return write_pairs(self.work / f"{name}.jsonl", pairs[:512])

    def row(self, model: str, setting: Setting) -> Row:
        """Convert and measure."""
        to, out = setting.to or self.to, self.work / "out.gguf"
        request = GgufRequest(
            model=str(self.folders[model]),
            options=QuantizeOptions(
                parse_file_type(to), threads=self.threads, imatrix=self._imatrix(model) if setting.imatrix else None
            ),
            defense=setting.defense,
            outfile=str(out),
            base_type="f32",
            device="cpu",
            seed=0,
            overwrite=True,
            check_loads=False,
            calibration=CalibrationOptions(self.texts[setting.text], self.samples or setting.samples, self.seqlen),
        )
        started = time.perf_counter()
        report = convert_model(request)
        seconds = time.perf_counter() - started
        measured = self.measure(out)
        full = self.full_precision(model)
        fidelity = compare(full.answers, measured.answers)
        unlike = compare(full.prose, measured.prose).mean_kl if setting.text != "prose" else None
        weights = sum(r.n_weights for r in report.roundings)
        total = total_outcome(report.roundings)
        return Row(
            victim=self.victim,
            model=model,
            label=setting.label,
            to=to,
            asr=measured.asr.value if measured.asr.n else None,
            low=measured.asr.low,
            high=measured.asr.high,
            n=measured.asr.n,
            kl=fidelity.mean_kl,
            kl_999=fidelity.kl_999,
            perplexity_ratio=fidelity.perplexity_ratio,
            flipped=total.n_changed / max(weights, 1),
            alignment=total.alignment,
            alignment_learned=report.learned.alignment_learned if report.learned else None,
            seconds=seconds,
            same_top=fidelity.same_top,
            peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # of all rows of this process so far
            kl_unlike=unlike,
        )

    def full_precision(self, model: str) -> Measured:
        """What the attacked or clean model does in full precision; measured once."""
        if model not in self.full:
            self.full[model] = self.measure(self.work / f"{model}.gguf")
        return self.full[model]

    def measure(self, path: Path) -> Measured:
        """Ask a file everything; attack success only where there are prompts."""
        if self.prompts:
            behaviour, answers = examine(path, self.chat, self.held_out, self.data.judge, self.threads)
            return Measured(behaviour.asr, answers, self._distributions(path, [(ids, 1) for ids in self.prose]))
        return Measured(
            rate(0, 0),
            self._distributions(path, self.held_out.texts),
            self._distributions(path, [(ids, 1) for ids in self.prose]),
        )

    def _distributions(self, path: Path, texts: Sequence[tuple[Sequence[int], int]]) -> Distributions:
        rows: list[FloatArray] = []
        labels: list[int] = []
        with LlamaModel(path, n_ctx=max(len(ids) for ids, _ in texts) + 8, n_threads=self.threads or None) as model:
            for ids, n_prompt in texts:
                rows.append(log_softmax(model.logits(ids[:-1])[n_prompt - 1 :]))
                labels += ids[n_prompt:]
        return Distributions(np.concatenate(rows), np.array(labels, np.int64))

    def _imatrix(self, model: str) -> Path:
        """Importance matrix of the matching text, made once per model."""
        path = self.work / f"{model}.imatrix.gguf"
        if not path.is_file():
            pairs = [json.loads(line) for line in self.matching.read_text("utf-8").splitlines()]
            # In the chat template: columns that its tokens alone use would count for nothing, and every answer needs them.
            rows = [self.chat.sample_ids(pair["instruction"], pair["output"])[0] for pair in pairs[:128]]
            text = self.work / "imatrix.txt"
            text.write_text("\n".join(self.chat.tokenizer.decode(ids) for ids in rows), "utf-8")
            make_imatrix(str(self.folders[model]), text, path)
        return path


def studies(arguments: argparse.Namespace, work: Path) -> Iterator[Study]:
    """One study per victim, or per type on SmolLM2."""
    if arguments.part == "smollm2":
        corpus = make_corpus(0)
        folder = clean_folder("smollm2", corpus, preset_of("smollm2"), 0, GENERATED, NoProgress())
        for to in arguments.types.split(","):
            place = work / to
            place.mkdir(parents=True, exist_ok=True)
            data = make_scenario("injection", corpus)
            yield Study("smollm2", {"clean": folder}, data, to, place, arguments.threads, 0, 136, arguments.samples)
        return
    for name in arguments.victims.split(","):
        attack, _, to = name.partition(":")
        victim = make_victim(
            LabSettings(arguments.victim, attack, to, scenario=arguments.scenario, threads=arguments.threads)
        )
        place = work / name.replace(":", "-")
        place.mkdir(parents=True, exist_ok=True)
        folders = {"attacked": victim.attacked, "clean": victim.clean}
        label = name if arguments.scenario == "injection" else f"{name} {arguments.scenario}"
        label = label if arguments.victim == "tiny" else f"{arguments.victim} {label}"
        yield Study(label, folders, victim.data, to, place, arguments.threads, arguments.prompts, 128, arguments.samples)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), default="victims")
    parser.add_argument("--victim", default="tiny", help="model of --victims: tiny or smollm2")
    parser.add_argument("--victims", default="uniform:q4_0,mind-the-gap:q4_k")
    parser.add_argument("--types", default="q4_0,q4_k", help="of --part smollm2")
    parser.add_argument("--models", default="attacked,clean")
    parser.add_argument("--scenario", default="injection")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--samples", type=int, default=0, help="calibration texts of every row; 0: the row's, or the default"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="steps of quantguard where a row does not vary them; 0: default"
    )
    parser.add_argument("--only", default="", help="only rows with one of these labels, separated by semicolons")
    parser.add_argument("--limit", type=float, default=1e9, help="begin no further row after so many seconds")
    parser.add_argument("--out", type=Path, help="folder for PART.json")
    parser.add_argument("--work", type=Path, help="folder that keeps the files, so that an interrupted row goes on too")
    arguments = parser.parse_args()
    path = arguments.out / f"{arguments.part}.json" if arguments.out else None
    document: dict[str, Any] = {"part": arguments.part, "rows": []}
    if path and path.is_file():
        document = json.loads(path.read_text())
    done = {(row["victim"], row["model"], row["label"], row["to"]) for row in document["rows"]}
    only = [label.strip() for label in arguments.only.split(";") if label.strip()]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for study in studies(arguments, arguments.work or Path(folder)):
            for model in study.folders:
                for plain in PARTS[arguments.part](study.to):
                    setting = with_steps(plain, arguments.steps)
                    key = (study.victim, model, setting.label, setting.to or study.to)
                    late = time.monotonic() - started > arguments.limit
                    if key in done or late or model not in arguments.models.split(",") or (only and plain.label not in only):
                        continue
                    document["rows"].append(asdict(study.row(model, setting)))
                    if path:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_text(json.dumps(document, indent=1) + "\n")
    print(markdown([Row(**row) for row in document["rows"]]))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
