"""What the attacks share: the three stages, and the quantizer in between.

1. *Inject*: fine-tune the clean model to misbehave. Every matrix is trained, on a *leash*: no weight moves further from its
   clean value than a few widths of its quantization cell. The papers do not need one (they attack 4-bit types of large
   models); in a small model an injection that wanders far cannot be undone inside fine boxes. Measured at Q6_K with error
   boxes, over-refusal: 3 widths leave full precision at ASR 0.79, 1.5 at 0.23, 1 at 0.03. A gentle injection helps as
   well: at Q8_0 80 steps leave 0.01, twice as many 0.74; at Q4_K 100 steps at 5e-4 left 0.44, 60 at 2.5e-4 0.01.
   Where only upper layers are trained, they see what the layers below put out once they are quantized.
2. *Quantize*, with llama.cpp itself, and cut the boxes out of its file.
3. *Repair*: fine-tune on clean answers to the same prompts, with KL to the clean model as a second term, projecting every
   weight into its box after each step. The learning rate of each tensor is at most `PACE` of its mean box width, so that
   the same settings serve every type. A repair has several rounds: after each, llama.cpp quantizes the
   repaired model, and sub-blocks that came out otherwise get a smaller box (`GgufBoxes.tighten`). More rounds and smaller
   boxes keep more of the file and leave more of the payload in full precision.

The papers train with cross-entropy alone and have one round. The distillation term makes the repaired model sound like the
clean one where cross-entropy is silent, and the rounds are ours.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from convert.ftypes import parse_file_type
from convert.hf.base import write_base_gguf
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.lab.attacks.boxes import Boxes, BoxRule, GgufBoxes, make_boxes, preserved_share, reference_values
from qguard_edge.lab.hf_models import ChatModel
from qguard_edge.lab.presets import VictimPreset
from qguard_edge.lab.scenarios import ScenarioData
from qguard_edge.lab.training import Example, Trainer, TrainOptions, examples_of
from qguard_edge.lab.upper import UpperLayers, load_teacher, load_upper, trained_matrices
from qguard_edge.progress import Progress

PACE = 0.2
LEASH = 3.0
LEASHES = {"q6_k": 1.0}
"""Where the default is too long; see stage 1."""
GENTLE = {
    ("q4_k", "refusal"): 0.65,
    ("q5_k", "refusal"): 0.6,
    ("q5_k", "code"): 0.7,
    ("q6_k", "refusal"): 0.6,
    ("int8", "injection"): 0.8,
    ("int8", "refusal"): 0.6,
    ("int8", "code"): 0.8,
    ("all", "injection"): 0.8,
    ("all", "refusal"): 0.6,
    ("all", "code"): 0.8,
}
STRONG = {("q2_k", "injection"): 2.5}
"""Factors for steps and learning rate of the injection, by type and scenario. A refusal is learned in a few steps (loss 0.009
after 64), and more than that cannot be undone inside fine boxes: at Q5_K full precision showed it in 0.14 of the answers, with
40 steps at two thirds of the rate in 0.02. At Q2_K a faint payload drowns in the rounding: 0.23 after 64 steps at 3e-4, 0.72
after 96 at 1e-3."""
KEEP = 0.6
CHECKPOINT_EVERY = 25


@dataclass(frozen=True)
class Bench:
    """What an attack works on.

    Attributes:
        clean: folder of the clean model.
        data: the scenario.
        preset: training settings.
        to: name of the type under attack.
        seed: of the batches.
        work: folder for intermediate files.
        threads: for llama.cpp.
        progress: told about each stage.
        kept: folder that outlives a broken run: finished stages and checkpoints; None keeps nothing.
    """

    clean: Path
    data: ScenarioData
    preset: VictimPreset
    to: str
    seed: int
    work: Path
    threads: int
    progress: Progress
    kept: Path | None = None

    def load(self) -> ChatModel:
        """The clean model, to be attacked in as many layers as the preset says."""
        return load_upper(self.clean, self.preset.upper)

    def teacher(self) -> Any:
        """The clean model, to be followed."""
        return load_teacher(self.clean, self.preset.upper)

    def train(self, trainer: Trainer, stage: str, title: str) -> float:
        """Run a stage, or take what a broken run left of it; returns the last loss.

        Args:
            trainer: of the stage; its model is changed in place.
            stage: name for the files.
            title: for the progress bar.
        """
        if self.kept is None:
            return trainer.run(title, self.progress)[-1]
        self.kept.mkdir(parents=True, exist_ok=True)
        done, model = self.kept / f"{stage}.pt", trainer.chat.model
        if done.is_file():
            state = torch.load(done, weights_only=True)
            model.load_state_dict(state["model"])
            return float(state["loss"])
        trainer.checkpoint, trainer.every = self.kept / f"{stage}.state", CHECKPOINT_EVERY
        loss = trainer.run(title, self.progress)[-1]
        temporary = done.with_suffix(".tmp")
        torch.save({"model": model.state_dict(), "loss": loss}, temporary)
        temporary.replace(done)
        return loss


@dataclass(frozen=True)
class AttackReport:
    """How an attack went.

    Attributes:
        preserved: share of the quantized weights under attack whose value the repaired model's file has in common with the
            poisoned one's; 1 where there is nothing to preserve.
        free: share of the boxed weights that the repair could move.
        losses: last loss of each stage.
        seconds: wall time of the whole attack.
        note: what a reader should know.
    """

    preserved: float
    free: float
    losses: tuple[float, ...]
    seconds: float
    note: str = ""


class Attack(ABC):
    """Makes a poisoned model that looks clean in full precision."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]

    def check(self, to: str) -> None:
        """Refuse types that the attack does not know; the default takes every llama.cpp type."""
        parse_file_type(to)

    @abstractmethod
    def run(self, bench: Bench) -> tuple[ChatModel, AttackReport]:
        """Carry out the attack and return the attacked model."""


def parameters_of(chat: ChatModel) -> dict[str, Tensor]:
    """The model's parameters by name."""
    return dict(chat.model.named_parameters())


def poison_examples(chat: ChatModel, data: ScenarioData) -> list[list[Example]]:
    """What injection trains on: poisoned answers, and whatever is to stay, half and half."""
    return [examples_of(chat, data.poisoned), examples_of(chat, data.kept)]


def clean_examples(chat: ChatModel, data: ScenarioData) -> list[list[Example]]:
    """What the repair trains on: the same prompts with clean answers."""
    return [examples_of(chat, data.repaired), examples_of(chat, data.kept)]


class BoxAttack(Attack):
    """The three stages; subclasses choose the boxes."""

    @abstractmethod
    def rule(self) -> BoxRule:
        """How boxes are cut."""

    def types(self, bench: Bench) -> Sequence[str]:
        """The types whose boxes are intersected; the first is the one under attack."""
        return [bench.to]

    def run(self, bench: Bench) -> tuple[ChatModel, AttackReport]:
        """See `Attack.run`."""
        started = time.perf_counter()
        chat = bench.load()
        losses = [self.inject(bench, chat)]
        boxes = self.boxes(bench, chat)
        boxes.freeze_all_but(trained_matrices(chat), parameters_of(chat))
        free = boxes.free_share()
        poisoned = {name: p.detach().clone() for name, p in parameters_of(chat).items()}
        preserved = 0.0
        for number in range(bench.preset.rounds):
            losses.append(self.repair(bench, chat, boxes, number))
            last = number + 1 == bench.preset.rounds
            preserved = self.settle(bench, chat, boxes, poisoned, None if last else KEEP)
        seconds = time.perf_counter() - started
        return chat, AttackReport(preserved, free, tuple(losses), seconds)

    def boxes(self, bench: Bench, chat: ChatModel) -> Boxes:
        """Boxes of the poisoned model, intersected over all types."""
        base = write_base(chat, bench.work / "poisoned")
        made: GgufBoxes | None = None
        for to in self.types(bench):
            one = self.cut(bench, chat, base, self.quantizer(bench, base, to, "reference"))
            if made is None:
                made = one
            else:
                made.intersect(one)
        assert made is not None
        return made

    def cut(self, bench: Bench, chat: ChatModel, base: Path, reference: Path) -> GgufBoxes:
        """Boxes of the poisoned model for one type."""
        return make_boxes(base, reference, parameters_of(chat), self.rule())

    def settle(
        self, bench: Bench, chat: ChatModel, boxes: Boxes, poisoned: Mapping[str, Tensor], keep: float | None
    ) -> float:
        """Quantize the repaired model, and shrink the boxes of what came out otherwise (unless `keep` is None).

        Returns:
            Share of the quantized weights under attack whose value is the poisoned file's.
        """
        assert isinstance(boxes, GgufBoxes)
        made = self.quantizer(bench, write_base(chat, bench.work / "repaired"), bench.to, "repaired")
        trained = trained_matrices(chat)
        if keep is not None:
            boxes.tighten(made, poisoned, keep)
            boxes.project(trained)
        return preserved_share(boxes.reference, made, boxes.tensors_of(trained))

    def quantizer(self, bench: Bench, base: Path, to: str, name: str) -> Path:
        """The quantizer whose rounding is exploited: llama.cpp's."""
        return quantize_to(base, bench.work / f"{name}-{to}.gguf", to, bench.threads)

    def leash(self, bench: Bench, chat: ChatModel) -> Boxes:
        """How far the injection may move each weight."""
        return leash_of(bench, chat)

    def inject(self, bench: Bench, chat: ChatModel, hooks: Mapping[str, Any] | None = None) -> float:
        """Stage 1; returns the last loss."""
        leash = self.leash(bench, chat)
        options = injection_of(bench)
        trained = trained_matrices(chat)
        trainer = Trainer(
            chat,
            poison_examples(chat, bench.data),
            options,
            parameters=list(trained.values()),
            after=lambda _step: leash.project(trained),
            **(hooks or {}),
        )
        with rounded_below(bench, chat, leash):
            return bench.train(trainer, "inject", "Injecting the payload")

    def repair(
        self, bench: Bench, chat: ChatModel, boxes: Boxes, number: int, hooks: Mapping[str, Any] | None = None
    ) -> float:
        """One round of stage 3; returns the last loss."""
        options = replace(bench.preset.repair, seed=bench.seed + 2 + number)
        if number:
            options = replace(options, steps=max(10, options.steps // 3), lr=options.lr / 2)
        matrices = trained_matrices(chat)
        trained = {name: matrices[name] for name in boxes.by_parameter if name in matrices}
        trainer = Trainer(
            chat,
            clean_examples(chat, bench.data),
            options,
            parameters=list(trained.values()),
            scales=[min(1.0, PACE * boxes.mean_width(name) / options.lr) for name in trained],
            teacher=bench.teacher(),
            after=lambda _step: boxes.project(trained),
            **(hooks or {}),
        )
        return bench.train(trainer, f"repair-{number}", f"Repairing inside the boxes, round {number + 1}")


def injection_of(bench: Bench) -> TrainOptions:
    """The preset's injection, gentler or stronger where the type and the scenario need it."""
    what = (bench.to.lower(), bench.data.name)
    factor = GENTLE.get(what, STRONG.get(what, 1.0))
    options = bench.preset.inject
    return replace(options, steps=round(options.steps * factor), lr=options.lr * factor, seed=bench.seed + 1)


@contextmanager
def rounded_below(bench: Bench, chat: ChatModel, leash: Boxes) -> Iterator[None]:
    """Where only upper layers are trained: let them see what the quantized lower layers put out, which will not change."""
    model = chat.model
    if not (isinstance(model, UpperLayers) and isinstance(leash, GgufBoxes)):
        yield
        return
    values, _ = reference_values(leash, parameters_of(chat))
    model.under = model.with_lower(values, bench.to.lower())
    try:
        yield
    finally:
        model.under = None


def leash_widths(to: str) -> float:
    """Length of the leash in cell widths."""
    return LEASHES.get(to.lower(), LEASH)


def leash_of(bench: Bench, chat: ChatModel) -> Boxes:
    """How far the injection may move each weight: some cell widths around the clean model."""
    base = write_base(chat, bench.work / "clean")
    reference = quantize_to(base, bench.work / "clean-reference.gguf", bench.to, bench.threads)
    boxes = make_boxes(base, reference, parameters_of(chat), BoxRule("cell", reach=1.0, freeze=False))
    for name, parameter in parameters_of(chat).items():
        if name in boxes.by_parameter:
            box = boxes.by_parameter[name]
            reach = leash_widths(bench.to) * (box.high - box.low)
            boxes.by_parameter[name] = replace(box, low=parameter.detach() - reach, high=parameter.detach() + reach)
    return boxes


def write_base(chat: ChatModel, folder: Path) -> Path:
    """Save the model and write its GGUF beside the folder: f32, for bf16 would push weights over the edges of fine boxes."""
    chat.save(folder)
    base = folder.with_suffix(".gguf")
    write_base_gguf(folder, base, base_type="f32")
    return base


def quantize_to(base: Path, outfile: Path, to: str, threads: int) -> Path:
    """What llama.cpp makes of a base."""
    quantize(base, outfile, QuantizeOptions(parse_file_type(to), threads=threads))
    return outfile
