"""The defenses' names, options and one-line meanings, importable without torch: the command line is built from this list.

Each defense has one frozen dataclass of options. Its fields become `--NAME-FIELD` options of `convert`, with the help text
that stands in the field's metadata.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_type_hints

from quant_grids.errors import UnsupportedError


def option(default: Any, help_text: str, **limits: Any) -> Any:
    """A dataclass field with the help text that the command line shows.

    Args:
        default: of the field.
        help_text: one line.
        limits: `minimum`, `maximum`, `choices`; `shown` is what to show in place of a default that means nothing to a reader.
    """
    return field(default=default, metadata={"help": help_text, **limits})


@dataclass(frozen=True)
class DefenseOptions:
    """Root of the option classes; `check` holds every field to its limits."""

    name: ClassVar[str]
    summary: ClassVar[str]
    implementation: ClassVar[str]  # "module:Class"
    calibrated: ClassVar[bool] = False  # whether it runs the model on text before it chooses

    @property
    def resumes(self) -> bool:
        """Whether an interrupted conversion leaves a checkpoint that the next one goes on from."""
        return False

    @property
    def label(self) -> str:
        """The name, with the options that are not at their defaults: `ortho width=0.5`."""
        changed = [
            f"{item.name}={getattr(self, item.name)}" for item in fields(self) if getattr(self, item.name) != item.default
        ]
        return " ".join([self.name, *changed])

    def check(self) -> None:
        """Refuse values outside their limits.

        Raises:
            UnsupportedError: naming the option, the value and the limit.
        """
        for item in fields(self):
            value = getattr(self, item.name)
            flag = f"--{self.name}-{item.name.replace('_', '-')}"
            choices = item.metadata.get("choices")
            if choices and value not in choices:
                raise UnsupportedError(f"{flag} {value!r}: choose one of {', '.join(map(str, choices))}")
            if isinstance(value, int | float) and not isinstance(value, bool):
                low, high = item.metadata.get("minimum", -math.inf), item.metadata.get("maximum", math.inf)
                if not low <= value <= high:
                    raise UnsupportedError(f"{flag} {value}: must lie between {low} and {high}")


@dataclass(frozen=True)
class NoneOptions(DefenseOptions):
    """llama.cpp's own rounding has no options."""

    name = "none"
    summary = "llama.cpp's own rounding, unchanged: the baseline"
    implementation = "qguard_edge.defenses.none:NoDefense"


@dataclass(frozen=True)
class OrthoOptions(DefenseOptions):
    """Orthogonal rounding, see `qguard_edge.defenses.ortho`."""

    name = "ortho"
    summary = (
        "orthogonal rounding: no error left along the direction the attacker relied on (data-free); costs fidelity on k-quants, "
        "does not stop an attacker who runs it"
    )
    implementation = "qguard_edge.defenses.ortho:Ortho"

    group: str = option("row", "weights over which the projection is balanced", choices=("row", "block", "tensor"))
    target: float | None = option(
        None,
        "share c of the old error direction that is left: 1 none removed, 0 orthogonal, below 0 over-corrected",
        minimum=-1.0,
        maximum=1.0,
        shown="0; Q6_K -0.25",
    )
    width: float = option(
        0.5,
        "width of the soft threshold, in units of a rounding step: 0 is the predictable greedy rule; only 1 withstands an "
        "attacker who aims at this defense, for more error",
        minimum=0.0,
        maximum=1.0,
    )


@dataclass(frozen=True)
class NoiseOptions(DefenseOptions):
    """Gaussian noise before rounding, see `qguard_edge.defenses.noise`."""

    name = "noise"
    summary = "Gaussian noise on the weights before they are rounded (data-free; arXiv 2405.18137)"
    implementation = "qguard_edge.defenses.noise:Noise"

    mode: str = option(
        "requantize",
        "requantize: llama.cpp quantizes the noised model; fixed-grid: keep the plain scales",
        choices=("requantize", "fixed-grid"),
    )
    relative: float = option(0.3, "sigma in units of half the tensor's median rounding step", minimum=0.0, maximum=10.0)
    sigma: float = option(0.0, "absolute sigma in place of the relative one; 0 means relative", minimum=0.0, maximum=10.0)


@dataclass(frozen=True)
class FlipGuardOptions(DefenseOptions):
    """FlipGuard, see `qguard_edge.defenses.flipguard`."""

    name = "flipguard"
    summary = "flip the weights with the largest normalised error of each block (data-free; arXiv 2606.28962)"
    implementation = "qguard_edge.defenses.flipguard:FlipGuard"

    share: float = option(0.1, "share of each block's weights to flip", minimum=0.0, maximum=1.0)
    bound: float = option(
        0.25, "squared error the flips may add to a block, relative to the block's own", minimum=0.0, maximum=10.0
    )
    extremes: bool = option(False, "also flip the weights that hold a sub-block's lowest and highest code")


@dataclass(frozen=True)
class QVecOptions(DefenseOptions):
    """QVec, see `qguard_edge.defenses.qvec`."""

    name = "qvec"
    summary = "subtract a multiple of the quantization vector, then round (data-free; arXiv 2606.20254)"
    implementation = "qguard_edge.defenses.qvec:QVec"

    mode: str = option(
        "requantize",
        "requantize: llama.cpp quantizes the moved model; fixed-grid: keep the plain scales",
        choices=("requantize", "fixed-grid"),
    )
    strength: float = option(0.25, "lambda: how much of the quantization vector is subtracted", minimum=0.0, maximum=2.0)


@dataclass(frozen=True)
class FeedbackOptions(DefenseOptions):
    """Error feedback, see `qguard_edge.defenses.feedback`. Needs to know what each matrix is fed."""

    name = "feedback"
    summary = (
        "error feedback: errors made up for where the inputs allow it, drawn at random, alignment constrained (calibrated)"
    )
    implementation = "qguard_edge.defenses.feedback:Feedback"
    calibrated = True

    alignment: float = option(
        0.0,
        "constraint: share c of the old error direction that may be left per tensor; 1 is none",
        minimum=-1.0,
        maximum=1.0,
    )
    width: float = option(
        0.4,
        "randomness of the draws, in steps between codes: 0 is the predictable nearest code, 1 leaves no error in common",
        minimum=0.0,
        maximum=1.0,
    )


@dataclass(frozen=True)
class QuantGuardOptions(DefenseOptions):
    """QuantGuard: learned rounding, see `qguard_edge.learned.quantguard`. Its steps need torch's model."""

    name = "quantguard"
    summary = "feedback, then gradient steps that keep next-token distributions (calibrated, transformers; arXiv 2606.29239)"
    implementation = "qguard_edge.learned.quantguard:QuantGuard"
    calibrated = True

    scope: str = option(
        "model", "model: KL of the whole model; block: output error of one block", choices=("model", "block")
    )
    alignment: float = option(FeedbackOptions.alignment, "constraint, as --feedback-alignment", minimum=-1.0, maximum=1.0)
    width: float = option(
        0.75,
        "randomness of the draws, as --feedback-width; the steps win back what more of it costs",
        minimum=0.0,
        maximum=1.0,
    )
    steps: int = option(
        60, "gradient steps (of each block with --quantguard-scope block); 0: feedback alone", minimum=0, maximum=100_000
    )
    batch: int = option(0, "texts per step; 0: as many as make about 1024 tokens", minimum=0, maximum=4096)
    rate: float = option(0.004, "size of the first step", minimum=0.0, maximum=1.0)
    schedule: str = option("linear", "how the step falls", choices=("linear", "constant", "cosine"))
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third more time")

    @property
    def resumes(self) -> bool:
        """See `DefenseOptions.resumes`; block by block nothing is saved."""
        return self.scope == "model" and self.steps > 0

    @property
    def feedback(self) -> FeedbackOptions:
        """The rule that draws the codes it starts from."""
        return FeedbackOptions(self.alignment, self.width)


@dataclass(frozen=True)
class EfrapOptions(DefenseOptions):
    """EFRAP, see `qguard_edge.learned.efrap`. Needs torch's model and some text, but no end-to-end backward pass."""

    name = "efrap"
    summary = "learned rounding layer by layer: outputs kept, rounding errors turned (calibrated; arXiv 2405.12725)"
    implementation = "qguard_edge.learned.efrap:Efrap"
    calibrated = True

    alignment: float = option(
        1.0,
        "constraint: share c of the old error direction that may be left per tensor; 1 is none",
        minimum=-1.0,
        maximum=1.0,
    )
    steps: int = option(100, "Adam steps per layer", minimum=0, maximum=100_000)
    rate: float = option(0.02, "Adam's step", minimum=0.0, maximum=1.0)
    flip: float = option(1.0, "weight of the term that turns rounding errors", minimum=0.0, maximum=1e6)
    binarize: float = option(0.01, "weight of the term that drives the variables to an end", minimum=0.0, maximum=1e6)


DEFENSE_OPTIONS: Mapping[str, type[DefenseOptions]] = {
    cls.name: cls
    for cls in (
        NoneOptions,
        OrthoOptions,
        FlipGuardOptions,
        QVecOptions,
        NoiseOptions,
        FeedbackOptions,
        QuantGuardOptions,
        EfrapOptions,
    )
}
DATA_FREE = tuple(name for name, cls in DEFENSE_OPTIONS.items() if not cls.calibrated)
DEFAULT_DEFENSE = "feedback"


def options_class(name: str) -> type[DefenseOptions]:
    """The option class of a defense.

    Raises:
        UnsupportedError: no defense of that name.
    """
    if name not in DEFENSE_OPTIONS:
        raise UnsupportedError(f"--defense {name!r}: choose one of {', '.join(DEFENSE_OPTIONS)}")
    return DEFENSE_OPTIONS[name]


def parse_defense(text: str) -> DefenseOptions:
    """Options from a name and what is not at its default, separated by colons: `quantguard:steps=0:alignment=0`.

    Raises:
        UnsupportedError: an unknown name or option, or a value that is none for it.
    """
    from pydantic import TypeAdapter, ValidationError

    name, *settings = (part.strip() for part in text.split(":"))
    cls = options_class(name)
    kinds = {item: kind for item, kind in get_type_hints(cls).items() if item in {one.name for one in fields(cls)}}
    given: dict[str, Any] = {}
    for setting in settings:
        option_name, _, value = setting.partition("=")
        if option_name not in kinds:
            known = ", ".join(kinds) or "none"
            raise UnsupportedError(f"{text!r}: {name} has no option {option_name!r}; its options are: {known}")
        try:
            given[option_name] = TypeAdapter(kinds[option_name]).validate_python(value)
        except ValidationError as error:
            raise UnsupportedError(f"{text!r}: {value!r} is no value for {name}'s option {option_name}") from error
    options = cls(**given)
    options.check()
    return options
