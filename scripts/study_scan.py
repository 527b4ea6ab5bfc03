"""How well does `scan` separate clean models from attacked ones? The tables and the ROC plot of docs/scan.md.

Run: python scripts/study_scan.py --out docs/results/scan.json --plot docs/scan-roc.svg [--quick] [--deep N]

Clean models: the tiny model over seeds and training lengths, fine-tuned ones, one of them from a quantized model, a
random-weight model of every architecture, SmolLM2 as its package carries it (dequantized) and fine-tuned. Attacked models: the
lab's victims in `VICTIMS`, those that are in its cache, or all of them with `--train`. Every model is scanned as f32 and as
bf16. What was measured already is read from --out, so that a killed run goes on where it stopped.

With `--deep N` also the dose curve of N clean and of all attacked models. Prints Markdown; the last line is one JSON object.
"""

import argparse
import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from smollm2 import make_folder as make_smollm2

from convert.atomic import atomic_path
from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile, GgufModel
from convert.hf.base import write_base_gguf
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.lab import cache
from qguard_edge.lab.attacks.names import source_of
from qguard_edge.lab.cache import cache_root, key_of
from qguard_edge.lab.hf_models import load_folder
from qguard_edge.lab.runner import LabSettings, make_victim
from qguard_edge.lab.training import Trainer, TrainOptions, examples_of
from qguard_edge.lab.victims import TINY, clean_folder, corpus_of, preset_of
from qguard_edge.progress import NoProgress
from qguard_edge.scan.dose import dose_curve
from qguard_edge.scan.positions import BINS, CLOSED_FORM, closed_form, histogram
from qguard_edge.scan.results import Scan
from qguard_edge.scan.scanner import scan_model
from qguard_edge.scan.tensors import open_model
from qguard_edge.source import resolve_source
from qguard_edge.verify.statistics import wilson

CLOSED = ("q4_0", "q8_0", "int8", "nf4", "fp4")
CLEAN_REFERENCES = ("q3_k_m", "q6_k")
SEEDS, LENGTHS = (0, 1, 2), (20, 60, 150)
VICTIMS = (
    *(("uniform", "q4_0", scenario, 0) for scenario in ("injection", "refusal", "code")),
    ("uniform", "q4_0", "injection", 1),
    ("adaptive", "q4_0", "injection", 0),
    ("adaptive-greedy", "q4_0", "injection", 0),
    *(("uniform", "q8_0", scenario, 0) for scenario in ("injection", "refusal", "code")),
    *(("elq", kind, scenario, 0) for kind in ("nf4", "int8", "fp4") for scenario in ("injection", "refusal", "code")),
    *(("elq", kind, "injection", 1) for kind in ("nf4", "int8", "fp4")),
    ("mind-the-gap", "q2_k", "injection", 0),
    *(
        ("mind-the-gap", to, scenario, 0)
        for to in ("q3_k_m", "q4_k", "q5_k", "q6_k")
        for scenario in ("injection", "refusal", "code")
    ),
    ("mind-the-gap", "q4_k", "injection", 1),
    ("outlier", "q4_k", "injection", 0),
    ("outlier", "q4_k", "refusal", 0),
    ("outlier", "q4_k", "injection", 1),
)


@dataclass(frozen=True)
class Model:
    """A model folder with what is known about it; `attack` is empty for clean ones."""

    name: str
    group: str
    folder: Path
    attack: str = ""
    to: str = ""


@dataclass(frozen=True)
class Row:
    """One scan.

    Attributes:
        name: of the model.
        group: its row in the table.
        precision: f32 or bf16.
        attack: empty for clean models.
        to: the attacked type.
        severity: the worst finding's, or "none".
        found: codes with their severity and type.
        peaks: per type, height of the whole model's peak.
        bands: per type, the emptiest band.
        outliers: largest share of blotted chunks.
        ratio: largest typical ratio of a matrix.
    """

    name: str
    group: str
    precision: str
    attack: str
    to: str
    severity: str
    found: list[tuple[str, str, str]]
    peaks: dict[str, float]
    bands: dict[str, float]
    outliers: float
    ratio: float
    dose: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Identifies the row in --out."""
        return f"{self.name} {self.precision}"


# ---------------------------------------------------------------------------------------------------- the models
def clean_models(work: Path, quick: bool) -> Iterator[Model]:
    """Every clean model, made when it is asked for."""
    first = None
    for seed in SEEDS[: 1 if quick else None]:
        corpus = corpus_of(None, seed)
        for steps in (*LENGTHS, 300) if seed == 0 else LENGTHS:
            preset = TINY if steps == 300 else replace(TINY, clean=replace(TINY.clean, steps=steps))
            folder = clean_folder("tiny", corpus, preset, seed, "generated", NoProgress())
            first = folder if steps == 300 else first
            yield Model(f"tiny, seed {seed}, {steps} steps", "tiny, trained", folder)
    assert first is not None
    rounded = dequantized(first, work / "rounded")
    yield Model("tiny, Q8_0 written out again", "dequantized", rounded)
    if not quick:
        yield from random_models(work)
        folder = work / "smollm2"
        if not folder.exists():
            make_smollm2(folder)
        yield Model("SmolLM2-135M (dequantized Q4_1)", "dequantized", folder)
        folder = clean_folder("smollm2", corpus_of(None, 0), preset_of("smollm2"), 0, "generated", NoProgress())
        yield Model("SmolLM2-135M, fine-tuned from Q4_1", "fine-tuned from a quantized model", folder)
    yield Model("tiny, fine-tuned from Q8_0", "fine-tuned from a quantized model", fine_tuned(rounded, work / "from-q8", 1))
    for seed in (1, 2):
        yield Model(f"tiny, fine-tuned on corpus {seed}", "fine-tuned", fine_tuned(first, work / f"tuned-{seed}", seed))


def fine_tuned(start: Path, folder: Path, seed: int) -> Path:
    """The model trained on for 40 steps on another corpus."""
    if not (folder / "config.json").exists():
        chat = load_folder(start)
        pairs = [(sample.prompt, sample.answer) for sample in corpus_of(None, seed).train]
        Trainer(chat, [examples_of(chat, pairs)], TrainOptions(40, 1e-4, batch=16, seed=seed)).run("Fine-tuning")
        chat.save(folder)
    return folder


def dequantized(start: Path, folder: Path) -> Path:
    """The model as Q8_0 reads it back: written from the dequantized weights."""
    if (folder / "config.json").exists():
        return folder
    from quant_grids import GRIDS
    from quant_grids.ggml_type import type_named

    chat = load_folder(start)
    grid = GRIDS[type_named("Q8_0")]
    with torch.no_grad():
        for parameter in chat.model.parameters():
            if parameter.ndim == 2:
                runs = parameter.view(-1, 32)
                scale = (runs.abs().amax(1, keepdim=True) / 127).half()
                codes = (runs / scale.float()).round().clamp(-127, 127).to(torch.int8)
                blocks = torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), 1)
                parameter.copy_(grid.dequantize(blocks).view_as(parameter))
    chat.save(folder)
    return folder


def random_models(work: Path) -> Iterator[Model]:
    """One of each architecture, with random weights: the tests' own."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "convert" / "hf"))
    from hf_models import CASES, make_model, save_model
    from hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

    tokenizer = None
    for case in {case.family: case for case in reversed(CASES)}.values():
        folder = work / f"random-{case.name}"
        if not (folder / "config.json").exists():
            tokenizer = tokenizer or train_byte_bpe(digits_then_bytes())
            save_model(case, make_model(case), folder)
            save_tokenizer(tokenizer, folder)
        yield Model(f"random {case.family}", "random weights", folder)


def victims(train: bool) -> Iterator[Model]:
    """The lab's victims: those in the cache, or all."""
    for attack, to, scenario, seed in VICTIMS:
        settings = LabSettings(attack=attack, to=to, scenario=scenario, seed=seed, threads=1)
        folder = cache_root() / "attacked" / key_of(settings.attack_key(), attack=source_of(attack))
        if train or (folder / "attack.json").is_file():
            if not (folder / "attack.json").is_file():
                folder = make_victim(settings).attacked.parent
            yield Model(f"{attack} {to} {scenario} seed {seed}", f"{attack} {to}", folder / "model", attack, to)


@contextmanager
def as_bf16(folder: Path) -> Iterator[Path]:
    """A copy of a model with its weights in bf16."""
    with tempfile.TemporaryDirectory() as made:
        copy = Path(made) / folder.name
        shutil.copytree(folder, copy)
        for file in copy.glob("*.safetensors"):
            save_file({name: t.bfloat16() if t.is_floating_point() else t for name, t in load_file(file).items()}, file)
        yield copy


# ---------------------------------------------------------------------------------------------------- measuring
def scan(folder: Path, references: tuple[str, ...]) -> Scan:
    """Scan a folder for the closed-form types and for those of quantized files."""
    with (
        tempfile.TemporaryDirectory() as made,
        open_model(resolve_source(str(folder)), need_base=bool(references), progress=NoProgress()) as model,
    ):
        files = []
        for name in references:
            assert model.base is not None
            outfile = Path(made) / f"{name}.gguf"
            quantize(model.base.path, outfile, QuantizeOptions(parse_file_type(name)))
            files.append(GgufFile(outfile))
        return scan_model(model, CLOSED, files)


def references_of(model: Model) -> tuple[str, ...]:
    """Types that need a quantized file: the attacked one, or for the trained tiny models the usual k-quants."""
    if model.attack:
        return (model.to,) if model.attack in ("mind-the-gap", "outlier") else ()
    return CLEAN_REFERENCES if model.group == "tiny, trained" else ()


def measure(model: Model, precision: str) -> Row:
    """Scan one model in one precision."""
    if precision == "bf16":
        with as_bf16(model.folder) as copy:
            found = scan(copy, references_of(model))
    else:
        found = scan(model.folder, references_of(model))
    return Row(
        name=model.name,
        group=model.group,
        precision=precision,
        attack=model.attack,
        to=model.to,
        severity=str(found.worst or "none"),
        found=[(finding.code, str(finding.severity), finding.file_type or "") for finding in found.findings],
        peaks={kind: round(made.peak, 3) for kind, made in found.prints.items()},
        bands={kind: round(made.band, 3) for kind, made in found.prints.items()},
        outliers=max((share for _, share, _ in found.outliers), default=0.0),
        ratio=max((ratio for _, _, ratio in found.outliers), default=0.0),
    )


def with_dose(row: Row, model: Model, file_type: str) -> Row:
    """The row with the dose curve for a type; clean models have one for each type asked for."""
    with tempfile.TemporaryDirectory() as made:
        base = Path(made) / "base.gguf"
        write_base_gguf(model.folder, base)
        curve = dose_curve(GgufModel(base), parse_file_type(file_type), threads=1)
    low, high = curve.interval
    point = {"ratio": curve.ratio, "low": low, "high": high, "at": curve.lowest.target,
             "curve": [(p.target, p.mean_kl) for p in curve.points]}  # fmt: skip
    return replace(row, dose={**row.dose, file_type: point})


# ---------------------------------------------------------------------------------------------------- the tables
def hit(row: Row) -> bool:
    """Whether an attacked model has a dangerous finding of the kind its attack leaves."""
    wanted = {"QG201"} if row.attack == "outlier" else {"QG301", "QG302"}
    return any(code in wanted and severity == "dangerous" for code, severity, _ in row.found)


def share_text(hits: int, n: int) -> str:
    """`3 of 3 (44% to 100%)`."""
    if n == 0:
        return "-"
    interval = wilson(hits, n)
    return f"{hits} of {n} ({interval[0]:.0%} to {interval[1]:.0%})"


def tables(rows: list[Row]) -> list[str]:
    """Both tables as Markdown."""
    lines = [
        "| clean models | precision | dangerous | suspicious | highest peak | largest share of chunks |",
        "|" + "---|" * 6,
    ]
    clean = [row for row in rows if not row.attack]
    for group in dict.fromkeys(row.group for row in clean):
        for precision in ("f32", "bf16"):
            mine = [row for row in clean if row.group == group and row.precision == precision]
            if mine:
                peak = max((value for row in mine for value in row.peaks.values()), default=float("nan"))
                dangerous = share_text(sum(row.severity == "dangerous" for row in mine), len(mine))
                suspicious = share_text(sum(row.severity == "suspicious" for row in mine), len(mine))
                blotted = max(row.outliers for row in mine)
                lines.append(f"| {group} | {precision} | {dangerous} | {suspicious} | {peak:.2f} | {blotted:.3%} |")
    lines += ["", "| attack and type | found at f32 | found at bf16 | lowest statistic f32 / bf16 |", "|" + "---|" * 4]
    attacked = [row for row in rows if row.attack]
    for group in dict.fromkeys(row.group for row in attacked):
        cells = []
        for precision in ("f32", "bf16"):
            mine = [row for row in attacked if row.group == group and row.precision == precision]
            cells.append((share_text(sum(map(hit, mine)), len(mine)), min((score(row) for row in mine), default=0.0)))
        lines.append(f"| {group} | {cells[0][0]} | {cells[1][0]} | {cells[0][1]:.2f} / {cells[1][1]:.2f} |")
    return lines


def score(row: Row) -> float:
    """The statistic that the decision rests on: the highest peak over types, for outliers the share of chunks."""
    return row.outliers if row.attack == "outlier" else max(row.peaks.values(), default=0.0)


def area(clean: list[float], attacked: list[float]) -> float:
    """Area under the ROC curve: how often an attacked model scores higher."""
    pairs = [(a > c) + 0.5 * (a == c) for a in attacked for c in clean]
    return sum(pairs) / len(pairs) if pairs else float("nan")


def curve_of(clean: list[float], attacked: list[float]) -> tuple[list[float], list[float]]:
    """False and true positive rates over all thresholds."""
    limits = sorted({*clean, *attacked}, reverse=True)
    xs = [0.0, *(sum(c >= t for c in clean) / len(clean) for t in limits)]
    ys = [0.0, *(sum(a >= t for a in attacked) / len(attacked) for t in limits)]
    return xs, ys


def roc_sets(rows: list[Row]) -> dict[str, tuple[list[float], list[float]]]:
    """Scores of clean and attacked models, per question."""
    sets = {}
    for precision in ("f32", "bf16"):
        mine = [row for row in rows if row.precision == precision]
        clean = [score(row) for row in mine if not row.attack and row.peaks]
        sets[f"boxes, {precision}"] = (clean, [score(row) for row in mine if row.attack and row.attack != "outlier"])
        sets[f"outliers, {precision}"] = (
            [row.outliers for row in mine if row.attack != "outlier"],
            [row.outliers for row in mine if row.attack == "outlier"],
        )
    doses = [(bool(row.attack), -point["ratio"]) for row in rows for point in row.dose.values()]
    if doses:
        sets["dose curve, f32"] = ([s for bad, s in doses if not bad], [s for bad, s in doses if bad])
    return {name: pair for name, pair in sets.items() if pair[0] and pair[1]}


def plot(sets: dict[str, tuple[list[float], list[float]]], path: Path) -> None:
    """The ROC plot."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "qguard-edge"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.6, 4.6))
    styles = ("-", "--", "-.", ":", (0, (1, 3)))
    for (name, (clean, attacked)), style in zip(sets.items(), styles, strict=False):
        xs, ys = curve_of(clean, attacked)
        label = f"{name}: {area(clean, attacked):.3f} ({len(clean)} clean, {len(attacked)} attacked)"
        axes.plot(xs, ys, linestyle=style, label=label, drawstyle="steps-post", linewidth=2)
    axes.set_xlabel("clean models flagged")
    axes.set_ylabel("attacked models flagged")
    axes.set_xlim(-0.02, 1.0)
    axes.set_ylim(0.0, 1.02)
    axes.legend(loc="lower right", fontsize=8, title="area under the curve", title_fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip("."), metadata={"Date": None})


def shapes(models: list[Model], kinds: tuple[str, ...]) -> dict[str, list[float]]:
    """Clean density of each reference type at ten steps: the mean over models."""
    sums: dict[str, list[Any]] = {}
    for model in models:
        for kind, made in scan(model.folder, kinds).prints.items():
            if kind not in CLOSED:
                sums.setdefault(kind, []).append(torch.tensor(made.density).view(10, -1).mean(1))
    return {kind: [round(v, 3) for v in torch.stack(found).mean(0).tolist()] for kind, found in sorted(sums.items())}


def simulated() -> dict[str, list[float]]:
    """Density of each closed-form type for normal weights rounded to bf16, over one octave of standard deviations."""
    made = {}
    for kind in CLOSED_FORM:
        place, total = closed_form(kind, 512), torch.zeros(BINS, dtype=torch.int64)
        assert place is not None
        generator = torch.Generator().manual_seed(1)
        for i in range(200):
            weights = torch.randn(512, 512, generator=generator) * 0.02 * 2.0 ** (i / 200)
            total += histogram(place(weights.bfloat16().float(), "bf16"))
        made[f"{kind}@bf16"] = [round(v, 3) for v in (total * (BINS / total.sum())).tolist()]
    return made


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qguard-scan-study")
    parser.add_argument("--quick", action="store_true", help="few clean models")
    parser.add_argument("--train", action="store_true", help="make the victims that are not in the cache")
    parser.add_argument("--deep", type=int, default=0, help="dose curves of so many clean models and of all attacked ones")
    parser.add_argument("--null", action="store_true", help="only print the simulated densities of bf16 weights")
    parser.add_argument("--shapes", metavar="TYPES", help="only print the clean densities of these types")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.null:
        print(json.dumps(simulated()))
        return
    if arguments.shapes:
        chosen = [model for model in clean_models(arguments.work, quick=True) if model.group == "tiny, trained"]
        print(json.dumps(shapes(chosen, tuple(arguments.shapes.split(",")))))
        return
    known = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    rows = {row.key: row for row in (Row(**{**raw, "found": [tuple(f) for f in raw["found"]]}) for raw in known)}
    cache.code_version = functools.cache(cache.code_version)  # parsing the attacks' sources once per victim adds up
    models = []
    for model in chain(victims(arguments.train), clean_models(arguments.work, arguments.quick)):
        models.append(model)
        for precision in ("f32", "bf16"):
            key = f"{model.name} {precision}"
            if key not in rows:
                rows[key] = measure(model, precision)
                print(f"{key}: {rows[key].severity} {rows[key].peaks}", file=sys.stderr, flush=True)
                save(arguments.out, rows)
    clean = [model for model in models if not model.attack and dose_types(model)][: arguments.deep]
    attacked = [model for model in models if model.attack] if arguments.deep else []
    for model, kind in [(one, each) for one in (*clean, *attacked) for each in dose_types(one)]:
        key = f"{model.name} f32"
        if kind not in rows[key].dose:
            rows[key] = with_dose(rows[key], model, kind)
            print(f"{key}: dose {kind} {rows[key].dose[kind]['ratio']:.2f}", file=sys.stderr, flush=True)
            save(arguments.out, rows)
    listed = list(rows.values())
    print("\n".join(tables(listed)))
    sets = roc_sets(listed)
    if arguments.plot:
        plot(sets, arguments.plot)
    print(
        json.dumps(
            {name: {"auc": area(*pair), "clean": len(pair[0]), "attacked": len(pair[1])} for name, pair in sets.items()}
        )
    )


def dose_types(model: Model) -> tuple[str, ...]:
    """Types to draw the dose curve for."""
    if model.group == "random weights" or model.attack in ("elq", "outlier"):
        return ()
    return (model.to,) if model.attack else ("q4_0", "q4_k", "q6_k", "q8_0")


def save(path: Path, rows: dict[str, Row]) -> None:
    """Keep what was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"rows": [asdict(row) for row in rows.values()]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
