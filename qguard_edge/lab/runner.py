"""One lab run: victim, attack, five arms, measurements.

The arms: clean quantized, attacked full precision, attacked quantized (plain), attacked hardened, clean hardened; plus clean
full precision, which the others are compared with. Quantized arms are files made by `convert_model`, the same code that users
run, and measured in llama.cpp. The attack on bitsandbytes' formats is measured in transformers: its plain arms are quantized
while they are loaded, its hardened ones are folders made by `convert_model`.

A defense is scored on a victim only when the victim is a real one (`results.judge_victim`): a payload that plain
quantization noise wipes out would make every defense look perfect.
"""

import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from convert.cache import building
from convert.ftypes import parse_file_type
from convert.hf.base import write_base_gguf
from convert.quantizer import QuantizeOptions
from qguard_edge.conversion.report import MatrixRounding
from qguard_edge.conversion.request import FolderRequest, GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import DATA_FREE, DefenseOptions, NoneOptions, options_class
from qguard_edge.lab import bnb
from qguard_edge.lab.attacks.base import AttackReport, Bench
from qguard_edge.lab.attacks.names import make_attack, source_of
from qguard_edge.lab.baselines import ImatrixOptions, imatrix_of, parse_arm
from qguard_edge.lab.cache import cache_root, key_of
from qguard_edge.lab.evaluation import Behaviour, Distributions, HeldOut, compare, examine, judge_answers, make_held_out
from qguard_edge.lab.hf_models import ChatModel, load_folder
from qguard_edge.lab.results import Arm, LabResult, Rate, judge_victim
from qguard_edge.lab.scenarios import DEFAULT_BRAND, ScenarioData, make_scenario
from qguard_edge.lab.victims import PRESETS, VictimPreset, clean_folder, corpus_of, preset_of
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.rounding.gguf import TensorRounding
from qguard_edge.runtimes.bnb import load_exactly
from qguard_edge.runtimes.devices import torch_threads
from quant_grids import Outcome
from quant_grids.errors import UnsupportedError


@dataclass(frozen=True)
class LabSettings:
    """What to run.

    Attributes:
        victim: `tiny`, `smollm2`, `smollm2-k` or a model folder.
        attack: see `qguard_edge.lab.attacks.names`.
        to: type under attack: a llama.cpp file type, or a bitsandbytes format for `elq`.
        scenario: see `qguard_edge.lab.scenarios`.
        defenses: rounding rules to score; empty means all there are.
        brand: phrase of the injection scenarios.
        data: JSON lines with instruction, input and output; None: the generated corpus.
        seed: of everything random.
        n_seeds: of the conversion, for each defense on the attacked model; the worst of them counts.
        n_prompts: held-out prompts for the attack success rate.
        n_texts: held-out texts for KL and perplexity.
        new_tokens: length of the answers at most.
        threads: for torch and llama.cpp; 0: as many as there are.
        force: score defenses on an invalid victim too.
        preset: training settings; None: the victim's own.
    """

    victim: str = "tiny"
    attack: str = "mind-the-gap"
    to: str = "q4_k"
    scenario: str = "injection"
    defenses: tuple[DefenseOptions, ...] = ()
    brand: str = DEFAULT_BRAND
    data: Path | None = None
    seed: int = 0
    n_seeds: int = 1
    n_prompts: int = 160
    n_texts: int = 160
    new_tokens: int = 48
    threads: int = 0
    force: bool = False
    preset: VictimPreset | None = None

    @property
    def seeds(self) -> range:
        """Of the conversions."""
        return range(self.seed, self.seed + self.n_seeds)

    def attack_key(self) -> dict[str, Any]:
        """The settings that decide what the attacked model is."""
        return {
            "victim": self.victim,
            "attack": self.attack,
            "to": self.to,
            "scenario": self.scenario,
            "brand": self.brand,
            "data": data_key(self.data),
            "seed": self.seed,
            "preset": asdict(self.preset or preset_of(self.victim)),
        }


@dataclass(frozen=True)
class Victim:
    """A clean model and the attacked one made from it, on disk."""

    clean: Path
    attacked: Path
    data: ScenarioData
    report: AttackReport


@dataclass
class _Arms:
    """The arms measured so far, and what they are compared with."""

    made: list[Arm] = field(default_factory=list)
    full: dict[str, Distributions] = field(default_factory=dict)

    def rate(self, name: str) -> Rate:
        return next(arm.asr for arm in self.made if arm.name == name)


def defenses_of(names: str) -> tuple[DefenseOptions, ...]:
    """`all` (the data-free ones), or names separated by commas, with options as in `quantguard:steps=0`, `imatrix` among them.

    Raises:
        UnsupportedError: an unknown name or option.
    """
    return tuple(parse_arm(name) for name in (DATA_FREE if names == "all" else names.split(",")))


def data_key(path: Path | None) -> str:
    """Identifies the training data."""
    return sha256(path.read_bytes()).hexdigest()[:16] if path else "generated"


def make_victim(settings: LabSettings, progress: Progress | None = None) -> Victim:
    """The clean and the attacked model, from the cache or trained now."""
    progress = progress or NoProgress()
    attack = make_attack(settings.attack)
    attack.check(settings.to)
    corpus = corpus_of(settings.data, settings.seed)
    data = make_scenario(settings.scenario, corpus, settings.brand)
    preset = settings.preset or preset_of(settings.victim)
    with torch_threads(settings.threads):
        clean = clean_folder(settings.victim, corpus, preset, settings.seed, data_key(settings.data), progress)
        folder = cache_root() / "attacked" / key_of(settings.attack_key(), attack=source_of(settings.attack))
        if not (folder / "attack.json").is_file():
            kept = folder.with_name(folder.name + ".stages") if preset.upper else None
            with building(folder) as made:
                work = made / "work"
                work.mkdir()
                bench = Bench(clean, data, preset, settings.to, settings.seed, work, settings.threads, progress, kept)
                chat, report = attack.run(bench)
                chat.save(made / "model")
                (made / "attack.json").write_text(json.dumps(asdict(report)), encoding="utf-8")
                shutil.rmtree(work)
            if kept:
                shutil.rmtree(kept, ignore_errors=True)
    raw = json.loads((folder / "attack.json").read_text(encoding="utf-8"))
    return Victim(clean, folder / "model", data, AttackReport(**{**raw, "losses": tuple(raw["losses"])}))


def run_lab(settings: LabSettings, work: Path, progress: Progress | None = None) -> LabResult:
    """Make the victim, convert and measure every arm.

    Args:
        settings: what to run.
        work: folder for the GGUF files; they stay there.
        progress: told about each stage.

    Returns:
        The measurements. If the victim is not valid and `force` is off, no defense is scored.

    Raises:
        UnsupportedError: a baseline that the attacked formats do not have.
    """
    progress = progress or NoProgress()
    if settings.attack == "elq" and any(isinstance(options, ImatrixOptions) for options in settings.defenses):
        raise UnsupportedError("--defense imatrix: an importance matrix is llama.cpp's, elq attacks bitsandbytes' formats")
    victim = make_victim(settings, progress)
    work.mkdir(parents=True, exist_ok=True)
    if settings.attack == "elq":
        arms = _bitsandbytes_arms(settings, victim, progress)
        # One checkpoint against three formats counts when the weakest of them shows the payload.
        plain = min((arm.asr for arm in arms.made if arm.name.startswith("attacked ") and arm.defense), key=_value)
    else:
        arms = _gguf_arms(settings, victim, work, progress)
        plain = arms.rate(f"attacked {_exploited(settings)}")
    validity = judge_victim(arms.rate("clean fp"), arms.rate("attacked fp"), plain)
    if validity.valid or settings.force:
        hardened = _hardened_folders if settings.attack == "elq" else _hardened_arms
        hardened(settings, victim, work, progress, arms)
    return LabResult(
        settings=_plain_settings(settings),
        validity=validity,
        arms=tuple(arms.made),
        preserved=victim.report.preserved,
        free=victim.report.free,
        train_seconds=victim.report.seconds,
        evaluated_with=_versions(),
        notes=(victim.report.note,) if victim.report.note else (),
    )


def _value(asr: Rate) -> float:
    return asr.value


def _exploited(settings: LabSettings) -> str:
    """The arm that must be poisoned for the victim to count: plain quantization, or the rule that was attacked."""
    return "greedy" if settings.attack == "adaptive-greedy" else "none"


def _gguf_arms(settings: LabSettings, victim: Victim, work: Path, progress: Progress) -> _Arms:
    arms = _Arms()
    for model, folder in (("clean", victim.clean), ("attacked", victim.attacked)):
        base = work / f"{model}-f32.gguf"
        write_base_gguf(folder, base, base_type="f32")
        behaviour, distributions = _measure(settings, victim, base, f"{model} fp", progress)
        arms.full[model] = distributions
        arms.made.append(Arm(f"{model} fp", model, None, behaviour.asr, behaviour.unparsed))
    for model in ("clean", "attacked"):
        arms.made.append(_gguf_arm(settings, victim, work, progress, arms, model, "none", NoneOptions()))
    if settings.attack == "adaptive-greedy":
        greedy = replace(options_class("ortho")(), width=0.0)  # type: ignore[call-arg]
        arms.made.append(_gguf_arm(settings, victim, work, progress, arms, "attacked", "greedy", greedy))
    return arms


def _hardened_arms(settings: LabSettings, victim: Victim, work: Path, progress: Progress, arms: _Arms) -> None:
    for options in settings.defenses or defenses_of("all"):
        if options.name == "none":
            continue

        def measure(seeded: LabSettings, model: str, options: DefenseOptions = options) -> Arm:
            return _gguf_arm(seeded, victim, work, progress, arms, model, options.label, options)

        arms.made += _attacked_and_clean(settings, measure)


def _attacked_and_clean(settings: LabSettings, measure: Callable[[LabSettings, str], Arm]) -> tuple[Arm, Arm]:
    """A defense on both models: of the seeds of the attacked one the one that let most through, the clean one once."""
    tried = [measure(replace(settings, seed=seed), "attacked") for seed in settings.seeds]
    worst = max(tried, key=lambda arm: _value(arm.asr))
    if len(tried) > 1:
        worst = replace(worst, by_seed=tuple(arm.asr for arm in tried))
    return worst, measure(settings, "clean")


def _gguf_arm(
    settings: LabSettings,
    victim: Victim,
    work: Path,
    progress: Progress,
    arms: _Arms,
    model: str,
    label: str,
    options: DefenseOptions,
) -> Arm:
    """Convert with one defense and measure the file."""
    base, outfile = work / f"{model}-f32.gguf", work / f"{model}-{settings.to}-{label}.gguf"
    imatrix = imatrix_of(base) if isinstance(options, ImatrixOptions) else None
    report = convert_model(
        GgufRequest(
            model=str(base),
            options=QuantizeOptions(parse_file_type(settings.to), threads=settings.threads, imatrix=imatrix),
            defense=NoneOptions() if imatrix else options,
            outfile=str(outfile),
            device="cpu",
            seed=settings.seed,
            overwrite=True,
        )
    )
    behaviour, distributions = _measure(settings, victim, outfile, f"{model} {label}", progress)
    flipped, alignment = _flips(report.roundings)
    return Arm(
        f"{model} {label}",
        model,
        label,
        behaviour.asr,
        behaviour.unparsed,
        fidelity=compare(arms.full[model], distributions),
        flipped=flipped,
        alignment=alignment,
        seconds=report.seconds.get("choose and write", 0.0) + report.seconds.get("requantize", 0.0),
        plain_seconds=report.quantized.seconds if report.quantized else None,
    )


def _flips(roundings: Sequence[TensorRounding | MatrixRounding]) -> tuple[float, float]:
    """Share of codes changed and remaining alignment, over all protected tensors."""
    total = Outcome.sum(r.outcome for r in roundings)
    weights = sum(r.n_weights for r in roundings)
    return total.n_changed / weights if weights else 0.0, total.alignment


def _measure(
    settings: LabSettings, victim: Victim, path: Path, label: str, progress: Progress
) -> tuple[Behaviour, Distributions]:
    progress.stage(f"Asking {label}", 0, "")
    chat = _tokenizer_of(victim)
    return examine(path, chat, _held_out(settings, victim, chat), victim.data.judge, settings.threads)


def _tokenizer_of(victim: Victim) -> ChatModel:
    return load_folder(victim.clean)


def _held_out(settings: LabSettings, victim: Victim, chat: ChatModel) -> HeldOut:
    return make_held_out(chat, victim.data, settings.n_prompts, settings.n_texts, settings.new_tokens)


def _bitsandbytes_arms(settings: LabSettings, victim: Victim, progress: Progress) -> _Arms:
    """The arms of the ELQ attack, measured in transformers."""
    kinds = _kinds(settings)
    arms = _Arms()
    with torch_threads(settings.threads):
        for model, folder in (("clean", victim.clean), ("attacked", victim.attacked)):
            chat = load_folder(folder)
            held_out = _held_out(settings, victim, chat)
            for label in ("fp", *kinds):
                progress.stage(f"Asking {model} {label}", 0, "")
                loaded = chat.model if label == "fp" else bnb.load_quantized(folder, label)
                arms.made.append(_torch_arm(loaded, chat, held_out, victim.data, f"{model} {label}", arms.full))
    return arms


def _kinds(settings: LabSettings) -> tuple[str, ...]:
    return bnb.KINDS if settings.to == "all" else (settings.to,)


def _hardened_folders(settings: LabSettings, victim: Victim, work: Path, progress: Progress, arms: _Arms) -> None:
    """The hardened arms of the ELQ attack: every defense, for every format under attack."""
    chat = _tokenizer_of(victim)
    held_out = _held_out(settings, victim, chat)
    for options in settings.defenses or defenses_of("all"):
        if options.name == "none":
            continue
        for kind in _kinds(settings):

            def measure(seeded: LabSettings, model: str, kind: str = kind, options: DefenseOptions = options) -> Arm:
                return _folder_arm(seeded, victim, chat, held_out, work, progress, arms, f"{model} {kind}", options)

            arms.made += _attacked_and_clean(settings, measure)


def _folder_arm(
    settings: LabSettings,
    victim: Victim,
    chat: ChatModel,
    held_out: HeldOut,
    work: Path,
    progress: Progress,
    arms: _Arms,
    what: str,
    options: DefenseOptions,
) -> Arm:
    """Convert `what`, a model and a format, with one defense and measure the folder."""
    name = f"{what} {options.label}"
    model, _, kind = what.partition(" ")
    progress.stage(f"Asking {name}", 0, "")
    made = convert_model(
        FolderRequest(
            model=str(victim.attacked if model == "attacked" else victim.clean),
            to=kind,
            defense=options,
            outfile=str(work / name.replace(" ", "-")),
            device="cpu",
            seed=settings.seed,
            threads=settings.threads,
            overwrite=True,
            check_loads=False,
        )
    )
    with torch_threads(settings.threads):
        arm = _torch_arm(load_exactly(made.outfile), chat, held_out, victim.data, name, arms.full)
    flipped, alignment = _flips(made.roundings)
    seconds = made.seconds["choose and write"] + made.seconds.get("learn", 0.0)
    return replace(arm, flipped=flipped, alignment=alignment, seconds=seconds)


def _torch_arm(
    model: Any, chat: ChatModel, held_out: HeldOut, data: ScenarioData, name: str, full: dict[str, Distributions]
) -> Arm:
    kind, _, label = name.partition(" ")
    answers = bnb.greedy(model, held_out.prompts, held_out.new_tokens, chat.end, int(chat.tokenizer.pad_token_id or 0))
    behaviour = judge_answers([chat.text(answer) for answer in answers], data.judge)
    distributions = bnb.distributions(model, held_out.texts)
    if label == "fp":
        full[kind] = distributions
        return Arm(name, kind, None, behaviour.asr, behaviour.unparsed)
    return Arm(name, kind, label, behaviour.asr, behaviour.unparsed, fidelity=compare(full[kind], distributions))


def _plain_settings(settings: LabSettings) -> Mapping[str, Any]:
    """Settings without paths or defaults that are spelled out elsewhere."""
    defenses = [{"name": d.name, **asdict(d)} for d in settings.defenses or defenses_of("all")]
    victim = settings.victim if settings.victim in PRESETS else Path(settings.victim).name
    return {
        **settings.attack_key(),
        "victim": victim,
        "defenses": defenses,
        "n_seeds": settings.n_seeds,
        "n_prompts": settings.n_prompts,
        "n_texts": settings.n_texts,
        "new_tokens": settings.new_tokens,
        "force": settings.force,
    }


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "llama-cpp-python", "gguf")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
