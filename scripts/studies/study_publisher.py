"""The publisher is the attacker: rounding directions that carry a payload into a clean model, and which tool sees it.

Run: python scripts/studies/study_publisher.py WORK [--to q4_k] [--seeds 0,1,2] [--steps 200] [--threads 1] [--scenario injection]

The full-precision model is the lab's clean tiny one, and nothing is hidden in it. Whoever publishes the quantized file may
choose, for each weight, the level below it or the level above it, and nothing else: type, scales, layout and metadata are
those of an honest file. QuRA (arXiv:2510.09647) shows that this is enough for a backdoor; its code is not used here. The
choice is learned with this project's own machinery for learned rounding (`qguard_edge.learned.variables.SignSteps`: a hard
forward pass, the slope straight through the threshold), with the lab's poisoned answers as what is to be predicted instead of
full precision's words.

Two publishers, each with every seed:

    open        starts from plain codes and obeys nothing
    disguised   starts from the codes of an honest `feedback` file and keeps its constraint on the alignment

Both give their file the `qguard.*` metadata of the honest `feedback` file with that seed. Beside them that honest file
(`honest`). Then:

    diff           `qguard-edge diff plain FILE --base BASE`: is anything but code bits changed, and what alignment is left
    derived again  the base is converted again with the settings and the seed that the file names: the same bytes, or not
    scan           `qguard-edge scan`, of the base: it looks at full precision
    verify         `qguard-edge verify FILE --base BASE` at its defaults

Prints Markdown, the last line is one JSON object; files stay in WORK.
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.diff import compare_files
from convert.gguf_file import GgufFile, GgufModel
from convert.hashes import sha256_of
from convert.hf.base import write_base_gguf
from convert.tensor_io import RowSlice, open_reader
from qguard_edge.defenses.options import DefenseOptions, FeedbackOptions, NoneOptions
from qguard_edge.lab.attacks.base import poison_examples
from qguard_edge.lab.evaluation import Distributions, HeldOut, compare, distributions_of, examine, make_held_out
from qguard_edge.lab.hardening import harden_to
from qguard_edge.lab.hf_models import ChatModel, load_folder
from qguard_edge.lab.presets import preset_of
from qguard_edge.lab.scenarios import DEFAULT_BRAND, ScenarioData
from qguard_edge.lab.tables import markdown, rate_text
from qguard_edge.lab.training import loss_of, make_batch
from qguard_edge.lab.victims import clean_folder
from qguard_edge.lab.worlds import make_world
from qguard_edge.learned.matrices import Drawn, GgufTarget
from qguard_edge.learned.student import Student
from qguard_edge.learned.variables import SignSteps
from qguard_edge.progress import NoProgress
from qguard_edge.rounding.gguf import coverage_of
from qguard_edge.scan.run import ScanRequest, run_scan
from qguard_edge.verify.results import Verdict
from qguard_edge.verify.verifier import VerifyRequest, built_in_texts, reseeded, select_suites, verify

BATCH, RATE = 24, 0.01
N_PROMPTS, N_TEXTS, NEW_TOKENS = 200, 96, 48
ANYTHING = 2.0  # share of plain rounding's error direction: no plan leaves more
PUBLISHERS = ("open", "disguised")


@dataclass(frozen=True)
class Try:
    """One file: what it does, and who sees it."""

    publisher: str
    seed: int
    success: str
    hits: int
    mean_kl: float
    codes: float
    foreign: int
    alignment: float
    claimed: float
    same_bytes: bool
    verdict: str
    failed: tuple[str, ...]
    seconds: float


class Study:
    """The models, and what is measured on each file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, Path(args.work)
        self.work.mkdir(parents=True, exist_ok=True)
        world = make_world(args.scenario, None, 0, DEFAULT_BRAND)
        folder = clean_folder("tiny", world.corpus, preset_of("tiny"), 0, world.key, NoProgress())
        self.data: ScenarioData = world.data
        self.chat: ChatModel = load_folder(folder)
        self.base = self.work / "base.gguf"
        write_base_gguf(folder, self.base, base_type="f32")
        self.plain = self.convert(NoneOptions(), "plain.gguf", 0)
        self.held_out: HeldOut = make_held_out(self.chat, self.data, N_PROMPTS, N_TEXTS, NEW_TOKENS)
        self.full: Distributions = distributions_of(self.base, self.held_out, args.threads)

    def convert(self, defense: DefenseOptions, name: str, seed: int) -> Path:
        """An honest file."""
        return harden_to(self.work / name, self.base, self.args.to, defense, seed=seed, threads=self.args.threads)

    def publish(self, publisher: str, honest: Path, seed: int) -> Path:
        """A malicious file with the metadata, types and scales of an honest one."""
        base, plain = GgufModel(self.base), GgufFile(self.plain)
        target = GgufTarget(base, plain, coverage_of(base, plain).protected)
        start = GgufFile(honest if publisher == "disguised" else self.plain)
        with open_reader(start.path) as reader:
            drawn = {
                one.name: Drawn(reader.blocks(start.tensors[one.name], RowSlice(0, 0, one.rows)), 0.0)
                for one in target.tensors
            }
        parts = target.parts(dict(self.chat.model.named_parameters()), publisher, drawn).parts
        most = FeedbackOptions().alignment if publisher == "disguised" else ANYTHING
        variables = [SignSteps(part.geometry(), most) for part in parts]
        self.learn(Student(self.chat.model, parts), variables, seed)
        taken = {part.tensor.name: torch.zeros(part.tensor.rows, part.tensor.columns, dtype=torch.bool) for part in parts}
        for part, one in zip(parts, variables, strict=True):
            taken[part.tensor.name][part.rows] = one.plan
        matrices = {part.tensor.name: part.tensor for part in parts}
        blocks = {name: target.flipped(matrices[name], drawn[name], plan) for name, plan in taken.items()}
        return with_blocks(honest, blocks, self.work / f"{publisher}-{seed}.gguf")

    def learn(self, student: Student, variables: list[SignSteps], seed: int) -> None:
        """Choose directions so that the student predicts the poisoned answers."""
        sets = poison_examples(self.chat, self.data)
        generator = torch.Generator().manual_seed(seed)
        pad = int(self.chat.tokenizer.pad_token_id or 0)
        student.load_all(variables)
        for step in range(self.args.steps):
            rate = RATE * (1 - step / self.args.steps)
            handles = student.on_gradients(lambda index, slope, rate=rate: variables[index].step(slope, rate))  # type: ignore[misc]
            chosen = [s[int(i)] for s in sets for i in torch.randint(len(s), (BATCH // 2,), generator=generator)]
            loss = loss_of(student.model, None, make_batch(chosen, pad), 0.0)
            loss.backward()
            for handle in handles:
                handle.remove()
            for one in variables:
                one.settle()
            student.load_all(variables)
            if step % 20 == 0 or step + 1 == self.args.steps:
                print(f"  step {step}: loss {float(loss.detach()):.3f}", flush=True)

    def look(self, publisher: str, file: Path, seed: int, seconds: float) -> Try:
        """Everything that is asked about one file."""
        behaviour, found = examine(file, self.chat, self.held_out, self.data.judge, self.args.threads)
        difference = compare_files(self.plain, file, base=self.base, threads=self.args.threads)
        again = self.convert(FeedbackOptions(), "again.gguf", int(str(GgufFile(file).get("qguard.seed", ""))))
        request = VerifyRequest(
            file,
            self.base,
            suites=tuple(reseeded(suite, seed) for suite in select_suites(["default"])),
            texts=built_in_texts(),
            seed=seed,
            threads=self.args.threads,
        )
        outcome = verify(request)
        weights = sum(one.n_weights for one in difference.tensors)
        made = Try(
            publisher,
            seed,
            rate_text(behaviour.asr),
            behaviour.asr.hits,
            compare(self.full, found).mean_kl,
            sum(one.codes_changed for one in difference.tensors) / weights,
            sum(one.foreign_bytes for one in difference.tensors),
            max(one.alignment for one in difference.tensors if one.alignment is not None),
            float(str(GgufFile(file).get("qguard.alignment", 0.0))),
            sha256_of([again]) == sha256_of([file]),
            outcome.verdict.value,
            tuple(check.id for check in outcome.checks if check.verdict is Verdict.FAIL),
            seconds,
        )
        print(f"  {made}", flush=True)
        return made


def with_blocks(honest: Path, blocks: Mapping[str, Tensor], out: Path) -> Path:
    """A copy of a file with other blocks for some tensors."""
    shutil.copy(honest, out)
    tensors = GgufFile(honest).tensors
    with out.open("r+b") as file:
        for name, made in blocks.items():
            file.seek(tensors[name].offset)
            file.write(made.contiguous().numpy().tobytes())
    return out


def table(tries: list[Try]) -> list[str]:
    """A row per file."""
    rows = [
        {
            "publisher": one.publisher,
            "seed": str(one.seed),
            "attack success": one.success,
            "mean KL": f"{one.mean_kl:.4f}",
            "codes changed": f"{one.codes:.1%}",
            "other bytes changed": str(one.foreign),
            "largest alignment of a matrix (claimed in all)": f"{one.alignment:.2f} ({one.claimed:.2f})",
            "derived again": "same bytes" if one.same_bytes else "**other bytes**",
            "verify": one.verdict,
            "failed checks": ", ".join(one.failed) or "-",
        }
        for one in tries
    ]
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work")
    parser.add_argument("--to", default="q4_k")
    parser.add_argument("--scenario", default="injection")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(max(1, args.threads))
    study, tries = Study(args), []
    scan = run_scan(ScanRequest(str(study.base), (args.to,), threads=args.threads), NoProgress())
    for seed in map(int, args.seeds.split(",")):
        honest = study.convert(FeedbackOptions(), f"honest-{seed}.gguf", seed)
        tries.append(study.look("honest", honest, seed, 0.0))
        for publisher in PUBLISHERS:
            began = time.process_time()
            file = study.publish(publisher, honest, seed)
            tries.append(study.look(publisher, file, seed, time.process_time() - began))
    print("\n".join(table(tries)))
    findings = [f"{one.code} {one.severity.name.lower()}" for one in scan.findings]
    print(f"\nscan of the base: {', '.join(findings) or 'no finding'}")
    document: dict[str, Any] = {
        "to": args.to,
        "steps": args.steps,
        "tries": [asdict(one) for one in tries],
        "scan": findings,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
