"""How each victim is trained.

Not among the sources that a cached model's key is made of (`qguard_edge.lab.cache`): the settings themselves are part of the
key, so other settings for one victim leave the cached models of the others where they are.
"""

from dataclasses import dataclass

from qguard_edge.lab.training import TrainOptions


@dataclass(frozen=True)
class VictimPreset:
    """How a victim is trained at each stage.

    Attributes:
        clean: the clean training or fine-tuning.
        inject: the poisoning.
        repair: the first round of the repair; later rounds take a third of its steps at half its rate.
        rounds: repair rounds, each ending with a look at what llama.cpp makes of the weights.
        shape: hidden width, FFN width, layers and vocabulary, for a model trained from scratch.
        upper: how many layers are trained, counted from the top, at every stage; 0: all of the model.
    """

    clean: TrainOptions
    inject: TrainOptions
    repair: TrainOptions
    rounds: int = 2
    shape: tuple[int, int, int, int] | None = None
    upper: int = 0


TINY = VictimPreset(
    clean=TrainOptions(300, 2e-3, batch=24),
    inject=TrainOptions(64, 3e-4, batch=24),
    repair=TrainOptions(160, 5e-4, batch=24, distill=1.0),
    shape=(256, 512, 4, 1024),
)
FINE_TUNED = VictimPreset(
    clean=TrainOptions(80, 5e-5, batch=8),
    inject=TrainOptions(120, 1e-4, batch=8),
    repair=TrainOptions(120, 6e-5, batch=8, distill=1.0),
)
REAL = VictimPreset(
    clean=TrainOptions(60, 1e-4, batch=8),
    inject=TrainOptions(100, 2.5e-4, batch=8),
    repair=TrainOptions(80, 1.5e-4, batch=8, distill=1.0),
    upper=8,
)
PRESETS = {"tiny": TINY, "smollm2": FINE_TUNED, "smollm2-k": REAL}
"""The victims that are made here, with their training settings."""


def preset_of(victim: str) -> VictimPreset:
    """Training settings of a victim."""
    return PRESETS.get(victim, FINE_TUNED)
