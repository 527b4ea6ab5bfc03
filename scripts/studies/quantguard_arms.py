"""The arms of `scripts/studies/study_quantguard.py`: which defenses, with which options and which text, make one table."""

from dataclasses import dataclass, replace

from qguard_edge.defenses.options import (
    DefenseOptions,
    EfrapOptions,
    FeedbackOptions,
    NoneOptions,
    OrthoOptions,
    QuantGuardOptions,
)

LARGER = {"q4_0": ("q5_0", "q8_0"), "q4_k": ("q5_k", "q6_k"), "q4_k_m": ("q5_k", "q6_k"), "q6_k": ("q8_0",), "q8_0": ()}

OTHER_TEXTS = {"self-written text": "self", "code only": "code", "another language": "german"}
Q, E = QuantGuardOptions, EfrapOptions


@dataclass(frozen=True)
class Setting:
    """One row of a table: a type, a defense, and the text it sees."""

    label: str
    defense: DefenseOptions
    to: str | None = None
    text: str = "matching"
    samples: int | None = None
    imatrix: bool = False


def victim_settings(to: str) -> list[Setting]:
    """Arms of the main table."""
    return [
        Setting("plain", NoneOptions()),
        Setting("ortho", OrthoOptions()),
        Setting("quantguard", Q()),
        Setting("quantguard, start only", Q(steps=0)),
        Setting("quantguard, self-written text", Q(), text="self"),
        Setting("quantguard, no constraint", Q(alignment=1.0)),
        Setting("quantguard, block scope", Q(scope="block", steps=120)),
        Setting("efrap", E()),
        *larger_settings(to),
    ]


def larger_settings(to: str) -> list[Setting]:
    """Plain rounding with an importance matrix of the same text, and plain files one and two sizes up."""
    return [
        Setting("plain, imatrix", NoneOptions(), imatrix=True),
        *(Setting(f"plain {larger}", NoneOptions(), to=larger) for larger in LARGER[to]),
        *(Setting(f"plain {larger}, imatrix", NoneOptions(), to=larger, imatrix=True) for larger in LARGER[to]),
    ]


def ablation_settings(_to: str) -> list[Setting]:
    """One option at a time, on 128 texts."""
    settings = [
        Setting("feedback", FeedbackOptions()),
        Setting("default", Q()),
        *(Setting(f"c = {c}", Q(alignment=c)) for c in (1.0, 0.5, 0.25, 0.1, 0.0, -0.25)),
        *(Setting(f"width {width:g}", Q(width=width)) for width in (0.0, 0.5)),
        *(Setting(f"{steps} steps", Q(steps=steps)) for steps in (15, 30, 120, 240)),
        *(Setting(f"step {rate}", Q(rate=rate)) for rate in (0.001, 0.008, 0.016)),
    ]
    return [replace(setting, samples=128) for setting in settings]


def calibration_settings(_to: str) -> list[Setting]:
    """What the text does."""
    return [
        *(Setting(f"matching, {n} texts", Q(), samples=n) for n in (8, 32, 128, 512)),
        Setting("code only, 128 texts", Q(), text="code", samples=128),
        Setting("self-written, 128 texts", Q(), text="self"),
        Setting("prose unlike the test, 12 texts", Q(), text="prose"),
        Setting("another language, 128 texts", Q(), text="german", samples=128),
        Setting("no constraint, matching, 8 texts", Q(alignment=1.0), samples=8),
        Setting("no constraint, code only", Q(alignment=1.0), text="code", samples=128),
    ]


def smollm2_settings(to: str) -> list[Setting]:
    """Fidelity of a real model."""
    return [
        Setting("plain", NoneOptions()),
        Setting("ortho", OrthoOptions()),
        *(Setting(f"ortho, width {width:g}", OrthoOptions(width=width)) for width in (0.75, 1.0)),
        Setting("quantguard, start only", Q(steps=0)),
        *(Setting(f"quantguard, start only, {name}", Q(steps=0), text=text) for name, text in OTHER_TEXTS.items()),
        Setting("quantguard", Q()),
        Setting("quantguard, no constraint", Q(alignment=1.0)),
        Setting("efrap", E()),
        Setting("efrap, no flip term", E(flip=0.0)),
        *larger_settings(to),
    ]


def adaptive_settings(_to: str) -> list[Setting]:
    """What stands up to an attacker who runs a defense while training, on 128 texts."""
    settings = [
        Setting("plain", NoneOptions()),
        *(Setting(f"ortho, width {width:g}", OrthoOptions(width=width)) for width in (0.5, 1.0)),
        *(Setting(f"start only, c = {c:g}", Q(steps=0, alignment=c)) for c in (1.0, 0.1, -0.25)),
        *(Setting(f"start only, {name}", Q(steps=0), text=text) for name, text in OTHER_TEXTS.items()),
        Setting("60 steps (default)", Q()),
        *(Setting(f"60 steps, {name}", Q(), text=text) for name, text in OTHER_TEXTS.items()),
        Setting("120 steps", Q(steps=120)),
        Setting("60 steps, block scope", Q(scope="block", steps=60)),
        Setting("efrap", E()),
    ]
    return [replace(setting, samples=128) for setting in settings]


def german(number: int) -> tuple[str, str]:
    """A question and an answer in German; 512 different ones."""
    thing, place, day, deed = (
        ("ein Fahrrad", "einen alten Schrank", "zwei Eimer Farbe", "ein Klavier")[number % 4],
        ("am Hafen", "hinter dem Bahnhof", "in der Altstadt", "nahe der Grenze")[number // 4 % 4],
        ("Montag", "Dienstag", "Donnerstag", "Samstag")[number // 16 % 4],
        ("verkauft", "gefunden", "repariert", "verliehen", "gezeichnet", "versteckt", "gekauft", "verloren")[number // 64],
    )
    question = f"Was hat deine Nachbarin am {day} {place} {deed}?"
    return question, f"Sie hat am {day} {place} {thing} {deed}; davon erzählt sie noch heute gern."


PARTS = {
    "victims": victim_settings,
    "ablation": ablation_settings,
    "calibration": calibration_settings,
    "adaptive": adaptive_settings,
    "smollm2": smollm2_settings,
}


def with_steps(setting: Setting, steps: int) -> Setting:
    """Another number of steps where the row has the default one; the label says so."""
    if not steps or not isinstance(setting.defense, Q) or setting.defense.steps != Q().steps:
        return setting
    return replace(setting, defense=replace(setting.defense, steps=steps), label=f"{setting.label}, {steps} steps")
