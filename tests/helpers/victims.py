"""The models that the lab attacks for the tests: each trained once, kept in the lab's cache outside the repository.

Tests get them through the fixture `victims` (or one made from it) only: by that, `conftest.py` knows which tests may train.
"""

from collections.abc import Callable
from dataclasses import replace

from filelock import FileLock

from convert.cores import available_cores
from qguard_edge.lab.cache import cache_root, key_of
from qguard_edge.lab.presets import preset_of
from qguard_edge.lab.runner import LabSettings, Victim, make_victim
from qguard_edge.lab.victims import clean_folder
from qguard_edge.progress import NoProgress
from qguard_edge.runtimes.devices import torch_threads

GAP = LabSettings(attack="mind-the-gap", to="q4_k")
OUTLIER = LabSettings(attack="outlier", to="q4_k")
UNIFORM_REFUSAL = LabSettings(attack="uniform", to="q4_0", scenario="refusal")
UNIFORM_CODE = replace(UNIFORM_REFUSAL, scenario="code")
BITSANDBYTES = LabSettings(attack="elq", to="nf4")
TOOLS = replace(GAP, scenario="tools")
SLOW = (TOOLS,)
"""Trained for slow tests only."""
ALL = (GAP, OUTLIER, BITSANDBYTES, UNIFORM_REFUSAL, UNIFORM_CODE)

Victims = Callable[[LabSettings], Victim]


def get(settings: LabSettings) -> Victim:
    """The victim, trained now if no run before this one has. Processes that want the same one wait for each other."""
    settings = replace(settings, threads=available_cores())
    with _alone("clean"):  # which all the others start from
        _train_clean(settings)
    with _alone(key_of(settings.attack_key(), attack=None)):
        return make_victim(settings)


def _train_clean(settings: LabSettings) -> None:
    world, preset = settings.world(), settings.preset or preset_of(settings.victim)
    with torch_threads(settings.threads):
        clean_folder(settings.victim, world.corpus, preset, settings.seed, world.key, NoProgress())


def _alone(name: str) -> FileLock:
    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / name)
