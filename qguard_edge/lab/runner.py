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
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from qguard_edge.lab.arms import Arms, Partial, check_reusable, hash_of_model, result_of, shared_arms
from qguard_edge.lab.attacks.base import AttackReport, Bench
from qguard_edge.lab.attacks.names import make_attack, source_of
from qguard_edge.lab.baselines import ImatrixOptions, imatrix_of, parse_arm
from qguard_edge.lab.cache import cache_root, key_of
from qguard_edge.lab.evaluation import (
    Behaviour,
    Distributions,
    HeldOut,
    compare,
    distributions_of,
    examine,
    judge_answers,
    make_held_out,
)
from qguard_edge.lab.hf_models import ChatModel, load_folder
from qguard_edge.lab.presets import PRESETS, VictimPreset, preset_of
from qguard_edge.lab.results import NOT_JUDGED, Arm, LabResult, Validity, judge_victim
from qguard_edge.lab.scenarios import DEFAULT_BRAND, ScenarioData
from qguard_edge.lab.victims import clean_folder
from qguard_edge.lab.worlds import World, make_world, new_tokens, world_key
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
        scenario: see `qguard_edge.lab.scenarios`, and `tools`: `qguard_edge.lab.tool_world`.
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

    def world(self) -> World:
        """The corpus, and the scenario in it."""
        return make_world(self.scenario, self.data, self.seed, self.brand)

    def attack_key(self) -> dict[str, Any]:
        """The settings that decide what the attacked model is."""
        return {
            "victim": self.victim,
            "attack": self.attack,
            "to": self.to,
            "scenario": self.scenario,
            "brand": self.brand,
            "data": world_key(self.scenario, self.data, self.seed),
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


def defenses_of(names: str) -> tuple[DefenseOptions, ...]:
    """`all` (the data-free ones), or names separated by commas, with options as in `quantguard:steps=0`, `imatrix` among them.

    Raises:
        UnsupportedError: an unknown name or option.
    """
    return tuple(parse_arm(name) for name in (DATA_FREE if names == "all" else names.split(",")))


def make_victim(settings: LabSettings, progress: Progress | None = None) -> Victim:
    """The clean and the attacked model, from the cache or trained now."""
    progress = progress or NoProgress()
    attack = make_attack(settings.attack)
    attack.check(settings.to)
    world = settings.world()
    preset = settings.preset or preset_of(settings.victim)
    with torch_threads(settings.threads):
        clean = clean_folder(settings.victim, world.corpus, preset, settings.seed, world.key, progress)
        folder = cache_root() / "attacked" / key_of(settings.attack_key(), attack=source_of(settings.attack))
        if not (folder / "attack.json").is_file():
            kept = folder.with_name(folder.name + ".stages") if preset.upper else None
            with building(folder) as made:
                work = made / "work"
                work.mkdir()
                bench = Bench(clean, world.data, preset, settings.to, settings.seed, work, settings.threads, progress, kept)
                chat, report = attack.run(bench)
                chat.save(made / "model")
                (made / "attack.json").write_text(json.dumps(asdict(report)), encoding="utf-8")
                shutil.rmtree(work)
            if kept:
                shutil.rmtree(kept, ignore_errors=True)
    raw = json.loads((folder / "attack.json").read_text(encoding="utf-8"))
    return Victim(clean, folder / "model", world.data, AttackReport(**{**raw, "losses": tuple(raw["losses"])}))


def run_lab(
    settings: LabSettings,
    work: Path,
    progress: Progress | None = None,
    kept: Partial | None = None,
    reuse: Sequence[Path] = (),
) -> LabResult:
    """Make the victim, convert and measure every arm.

    Args:
        settings: what to run.
        work: folder for the GGUF files; they stay there.
        progress: told about each stage, and the rate of each arm.
        kept: where what is measured so far is kept, and taken up again; None keeps nothing.
        reuse: results of other runs, whose arms are taken over where they are the same (`arms.shared_arms`).

    Returns:
        The measurements. If the victim is not valid and `force` is off, no defense is scored.

    Raises:
        UnsupportedError: a baseline that the attacked formats do not have; results in `reuse` of other settings.
        OutputError: `kept` has results of other settings.
    """
    progress = progress or NoProgress()
    if settings.attack == "elq" and any(isinstance(options, ImatrixOptions) for options in settings.defenses):
        raise UnsupportedError("--defense imatrix: an importance matrix is llama.cpp's, elq attacks bitsandbytes' formats")
    names = (*_first_names(settings), *_hardened_names(settings))
    before = kept.read(_plain_settings(settings), names) if kept else None
    others = [result_of(path) for path in reuse]
    for path, other in zip(reuse, others, strict=True):
        check_reusable(path, other, _plain_settings(settings), _versions())
    victim = make_victim(settings, progress)
    models = {"clean": hash_of_model(victim.clean), "attacked": hash_of_model(victim.attacked)}
    work.mkdir(parents=True, exist_ok=True)

    def result(made: Sequence[Arm], missing: tuple[str, ...] = ()) -> LabResult:
        return LabResult(
            settings=_plain_settings(settings),
            validity=_judge(settings, made),
            arms=tuple(made),
            preserved=victim.report.preserved,
            free=victim.report.free,
            train_seconds=victim.report.seconds,
            evaluated_with=_versions(),
            notes=(victim.report.note,) if victim.report.note else (),
            models=models,
            missing=missing,
        )

    def keep(made: Sequence[Arm]) -> None:
        if kept:
            there = {arm.name for arm in made}
            kept.write(result(made, tuple(name for name in names if name not in there)))

    known: dict[str, Arm] = {}
    for path, other in zip(reuse, others, strict=True):
        shared = shared_arms(other, _plain_settings(settings), models)
        if not shared:
            progress.note(f"Nothing of {path.name} is taken over: its clean model is another.")
        known.update(shared)
    if before and before.models == models and before.evaluated_with == _versions():
        known.update({arm.name: arm for arm in before.arms})
    elif before:
        progress.note("The partial results are of other models or library versions: their arms are measured again.")
    arms = Arms(known, keep, progress)
    if settings.attack == "elq":
        _bitsandbytes_arms(settings, victim, progress, arms)
    else:
        _gguf_arms(settings, victim, work, progress, arms)
    if _judge(settings, arms.made).valid or settings.force:
        hardened = _hardened_folders if settings.attack == "elq" else _hardened_arms
        hardened(settings, victim, work, progress, arms)
    return result(arms.made)


def _judge(settings: LabSettings, made: Sequence[Arm]) -> Validity:
    """Whether the victim counts; not judged as long as an arm is missing that decides it."""
    rates = {arm.name: arm.asr for arm in made}
    # One checkpoint against three formats counts when the weakest of them shows the payload.
    poisoned = [f"attacked {kind}" for kind in (_kinds(settings) if settings.attack == "elq" else (_exploited(settings),))]
    if any(name not in rates for name in ("clean fp", "attacked fp", *poisoned)):
        return NOT_JUDGED
    plain = min((rates[name] for name in poisoned), key=lambda rate: rate.value)
    return judge_victim(rates["clean fp"], rates["attacked fp"], plain)


def _exploited(settings: LabSettings) -> str:
    """The arm that must be poisoned for the victim to count: plain quantization, or the rule that was attacked."""
    return "greedy" if settings.attack == "adaptive-greedy" else "none"


def _first_names(settings: LabSettings) -> tuple[str, ...]:
    """The arms that are measured whether the victim is valid or not, in their order."""
    if settings.attack == "elq":
        return tuple(f"{model} {label}" for model in ("clean", "attacked") for label in ("fp", *_kinds(settings)))
    exploited = dict.fromkeys(("none", _exploited(settings)))
    return ("clean fp", "attacked fp", "clean none", *(f"attacked {label}" for label in exploited))


def _hardened_names(settings: LabSettings) -> tuple[str, ...]:
    """The arms of the defenses, in their order."""
    kinds = [f"{kind} " for kind in _kinds(settings)] if settings.attack == "elq" else [""]
    return tuple(
        f"{model} {kind}{options.label}"
        for options in _scored(settings)
        for kind in kinds
        for model in ("attacked", "clean")
    )


def _scored(settings: LabSettings) -> list[DefenseOptions]:
    """The defenses that get arms of their own."""
    return [options for options in settings.defenses or defenses_of("all") if options.name != "none"]


def _gguf_arms(settings: LabSettings, victim: Victim, work: Path, progress: Progress, arms: Arms) -> None:
    def full(model: str) -> Arm:
        behaviour, arms.full[model] = _measure(settings, victim, _base(victim, work, model), f"{model} fp", progress)
        return Arm(f"{model} fp", model, None, behaviour.asr, behaviour.unparsed)

    def quantized(model: str, label: str, options: DefenseOptions) -> Arm:
        return _gguf_arm(settings, victim, work, progress, arms, model, label, options)

    for model in ("clean", "attacked"):
        for kept in work.glob(f"{model}-f32.*"):  # --keep-files: of another victim, perhaps
            kept.unlink()
        arms.add(f"{model} fp", partial(full, model))
    for model in ("clean", "attacked"):
        arms.add(f"{model} none", partial(quantized, model, "none", NoneOptions()))
    if settings.attack == "adaptive-greedy":
        greedy = replace(options_class("ortho")(), width=0.0)  # type: ignore[call-arg]
        arms.add("attacked greedy", partial(quantized, "attacked", "greedy", greedy))


def _base(victim: Victim, work: Path, model: str) -> Path:
    """The full-precision GGUF of a model, written where it is needed first."""
    base = work / f"{model}-f32.gguf"
    if not base.is_file():
        write_base_gguf(_folder(victim, model), base, base_type="f32")
    return base


def _hardened_arms(settings: LabSettings, victim: Victim, work: Path, progress: Progress, arms: Arms) -> None:
    for options in _scored(settings):

        def measure(seeded: LabSettings, model: str, options: DefenseOptions = options) -> Arm:
            return _gguf_arm(seeded, victim, work, progress, arms, model, options.label, options)

        arms.add(f"attacked {options.label}", partial(_worst, settings, measure))
        arms.add(f"clean {options.label}", partial(measure, settings, "clean"))


def _worst(settings: LabSettings, measure: Callable[[LabSettings, str], Arm]) -> Arm:
    """A defense on the attacked model: of the seeds of the conversion the one that let most through."""
    tried = [measure(replace(settings, seed=seed), "attacked") for seed in settings.seeds]
    worst = max(tried, key=lambda arm: arm.asr.value)
    return replace(worst, by_seed=tuple(arm.asr for arm in tried)) if len(tried) > 1 else worst


def _gguf_arm(
    settings: LabSettings,
    victim: Victim,
    work: Path,
    progress: Progress,
    arms: Arms,
    model: str,
    label: str,
    options: DefenseOptions,
) -> Arm:
    """Convert with one defense and measure the file."""
    base, outfile = _base(victim, work, model), work / f"{model}-{settings.to}-{label}.gguf"
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

    def of_base() -> Distributions:
        return distributions_of(base, _held_out(settings, victim, _tokenizer_of(victim)), settings.threads)

    full = arms.full_of(model, of_base)
    flipped, alignment = _flips(report.roundings)
    return Arm(
        f"{model} {label}",
        model,
        label,
        behaviour.asr,
        behaviour.unparsed,
        fidelity=compare(full, distributions),
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
    return make_held_out(
        chat, victim.data, settings.n_prompts, settings.n_texts, new_tokens(settings.scenario, settings.new_tokens)
    )


def _bitsandbytes_arms(settings: LabSettings, victim: Victim, progress: Progress, arms: Arms) -> None:
    """The arms of the ELQ attack, measured in transformers."""
    with torch_threads(settings.threads):
        for model in ("clean", "attacked"):
            chat = load_folder(_folder(victim, model))
            held_out = _held_out(settings, victim, chat)

            def measure(label: str, model: str = model, chat: ChatModel = chat, held_out: HeldOut = held_out) -> Arm:
                progress.stage(f"Asking {model} {label}", 0, "")
                loaded = chat.model if label == "fp" else bnb.load_quantized(_folder(victim, model), label)
                return _torch_arm(loaded, chat, held_out, victim, f"{model} {label}", arms)

            for label in ("fp", *_kinds(settings)):
                arms.add(f"{model} {label}", partial(measure, label))


def _folder(victim: Victim, model: str) -> Path:
    return victim.clean if model == "clean" else victim.attacked


def _kinds(settings: LabSettings) -> tuple[str, ...]:
    return bnb.KINDS if settings.to == "all" else (settings.to,)


def _hardened_folders(settings: LabSettings, victim: Victim, work: Path, progress: Progress, arms: Arms) -> None:
    """The hardened arms of the ELQ attack: every defense, for every format under attack."""
    chat = _tokenizer_of(victim)
    held_out = _held_out(settings, victim, chat)
    for options in _scored(settings):
        for kind in _kinds(settings):

            def measure(seeded: LabSettings, model: str, kind: str = kind, options: DefenseOptions = options) -> Arm:
                return _folder_arm(seeded, victim, chat, held_out, work, progress, arms, f"{model} {kind}", options)

            arms.add(f"attacked {kind} {options.label}", partial(_worst, settings, measure))
            arms.add(f"clean {kind} {options.label}", partial(measure, settings, "clean"))


def _folder_arm(
    settings: LabSettings,
    victim: Victim,
    chat: ChatModel,
    held_out: HeldOut,
    work: Path,
    progress: Progress,
    arms: Arms,
    what: str,
    options: DefenseOptions,
) -> Arm:
    """Convert `what`, a model and a format, with one defense and measure the folder."""
    name = f"{what} {options.label}"
    model, _, kind = what.partition(" ")
    progress.stage(f"Asking {name}", 0, "")
    made = convert_model(
        FolderRequest(
            model=str(_folder(victim, model)),
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
        arm = _torch_arm(load_exactly(made.outfile), chat, held_out, victim, name, arms)
    flipped, alignment = _flips(made.roundings)
    seconds = made.seconds["choose and write"] + made.seconds.get("learn", 0.0)
    return replace(arm, flipped=flipped, alignment=alignment, seconds=seconds)


def _torch_arm(model: Any, chat: ChatModel, held_out: HeldOut, victim: Victim, name: str, arms: Arms) -> Arm:
    kind, _, label = name.partition(" ")
    answers = bnb.greedy(model, held_out.prompts, held_out.new_tokens, chat.end, int(chat.tokenizer.pad_token_id or 0))
    behaviour = judge_answers([chat.text(answer) for answer in answers], victim.data.judge)
    distributions = bnb.distributions(model, held_out.texts)
    if label == "fp":
        arms.full[kind] = distributions
        return Arm(name, kind, None, behaviour.asr, behaviour.unparsed)
    full = arms.full_of(kind, lambda: bnb.distributions(load_folder(_folder(victim, kind)).model.eval(), held_out.texts))
    return Arm(name, kind, label, behaviour.asr, behaviour.unparsed, fidelity=compare(full, distributions))


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
