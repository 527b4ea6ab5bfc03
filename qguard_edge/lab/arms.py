"""The arms of a run, one after the other: each is kept as soon as it is measured, so that a broken run goes on where it was.

What is measured so far lies in `results.partial.json`, a result like any other that names the arms it lacks; it is replaced
whole after every arm and removed when the run is through. A second call takes its arms over if its settings, the files of both
models and the versions of the libraries are the same. A defense's own code is *not* compared: whoever changes it removes the
file.

Arms of *another* run can be taken over too (`shared_arms`): attacks on one victim have the clean model's arms in common, and a
run with one defense more has all but two.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.atomic import OutputError, atomic_path
from convert.hashes import sha256_of
from qguard_edge.lab.evaluation import Distributions
from qguard_edge.lab.results import Arm, LabResult, Rate, read_result, to_json
from qguard_edge.lab.tables import rate_text
from qguard_edge.progress import NoProgress, Progress
from quant_grids.errors import UnsupportedError

PARTIAL = "results.partial.json"
_FREE = ("defenses", "force")  # settings that no single arm depends on
_OF_THE_ATTACK = ("attack", "preset", "n_seeds")  # settings that no arm of the clean model depends on


@dataclass(frozen=True)
class Partial:
    """The file with what is measured so far.

    Attributes:
        path: of the file.
        overwrite: replace it if it is of other settings.
    """

    path: Path
    overwrite: bool = False

    def read(self, settings: Mapping[str, Any], names: Sequence[str]) -> LabResult | None:
        """What a broken run left, if this run can go on from there.

        Args:
            settings: of this run, as in its result.
            names: the arms of this run.

        Raises:
            OutputError: it is of other settings, or has arms that this run does not ask for: hours of work, perhaps.
        """
        if not self.path.is_file():
            return None
        found = read_result(self.path)
        same = _compared(found.settings) == _compared(settings) and {arm.name for arm in found.arms} <= set(names)
        if same:
            return found
        if self.overwrite:
            return None
        raise OutputError(
            f"{self.path} has partial results of other settings; call with those again to finish them, pass --overwrite to "
            "replace them, or choose another folder with --output"
        )

    def write(self, result: LabResult) -> None:
        """Replace the file."""
        with atomic_path(self.path) as temporary:
            temporary.write_text(to_json(result), encoding="utf-8")


def result_of(path: Path) -> LabResult:
    """The result of a file, or of a run's output folder: the partial one as long as there is no other."""
    if not path.is_dir():
        return read_result(path)
    whole, partial = path / "results.json", path / PARTIAL
    return read_result(partial if partial.is_file() and not whole.is_file() else whole)


def check_reusable(path: Path, found: LabResult, settings: Mapping[str, Any], versions: Mapping[str, str]) -> None:
    """Refuse another run whose arms would come out otherwise than this run's.

    Args:
        path: of the other run's results, for the message.
        found: the other run.
        settings: of this run, as in its result.
        versions: of the libraries of this run.

    Raises:
        UnsupportedError: it differs in more than the attack and the defenses.
    """
    differs = _unequal(found.settings, settings, (*_FREE, *_OF_THE_ATTACK))
    if found.evaluated_with != versions:
        differs.append("library versions")
    if differs:
        raise UnsupportedError(
            f"--reuse {path}: that run differs in {', '.join(differs)}; give a run with the same settings but for --attack and "
            "--defense, or leave it out"
        )


def shared_arms(found: LabResult, settings: Mapping[str, Any], models: Mapping[str, str]) -> dict[str, Arm]:
    """The arms of another run that this run would measure the same way, by name.

    Args:
        found: the other run, of the same settings but for attack and defenses (`check_reusable`).
        settings: of this run, as in its result.
        models: SHA-256 of the weights of both of its models.

    Returns:
        Those of the clean model, and those of the attacked one if that is the same too; none if the clean model is another.
    """
    if found.models.get("clean") != models["clean"]:
        return {}
    same = found.models == models and not _unequal(found.settings, settings, _FREE)
    return {arm.name: arm for arm in found.arms if same or arm.model == "clean"}


def _compared(settings: Mapping[str, Any], free: Sequence[str] = _FREE) -> Any:
    """Settings as JSON gives them back, without those that no arm depends on."""
    return {key: value for key, value in json.loads(json.dumps(settings)).items() if key not in free}


def _unequal(some: Mapping[str, Any], others: Mapping[str, Any], free: Sequence[str]) -> list[str]:
    """Names of the settings that differ."""
    a, b = _compared(some, free), _compared(others, free)
    return [key for key in {**a, **b} if a.get(key) != b.get(key)]


def hash_of_model(folder: Path) -> str:
    """Identifies the weights of a model folder."""
    return sha256_of(sorted(folder.glob("*.safetensors")))


@dataclass
class Arms:
    """The arms measured so far, and what they are compared with.

    Attributes:
        known: arms that need not be measured again, by name.
        keep: called with all arms after each one that was measured.
        progress: told the rate of each arm.
        made: in the order of the table.
        full: full precision's distributions, by model, as far as they were asked for.
    """

    known: Mapping[str, Arm] = field(default_factory=dict)
    keep: Callable[[Sequence[Arm]], None] = lambda _made: None
    progress: Progress = field(default_factory=NoProgress)
    made: list[Arm] = field(default_factory=list)
    full: dict[str, Distributions] = field(default_factory=dict)

    def add(self, name: str, measure: Callable[[], Arm]) -> None:
        """Measure an arm, unless it is known."""
        arm = self.known.get(name)
        if arm is None:
            arm = measure()
            self.made.append(arm)
            self.keep(self.made)
            self.progress.note(_line(arm))
        else:
            self.made.append(arm)
            self.progress.note(f"{_line(arm)} (measured before)")

    def full_of(self, model: str, measure: Callable[[], Distributions]) -> Distributions:
        """Full precision's distributions of a model, measured now if its arm was known."""
        if model not in self.full:
            self.full[model] = measure()
        return self.full[model]

    def rate(self, name: str) -> Rate:
        """Attack success of an arm."""
        return next(arm.asr for arm in self.made if arm.name == name)


def _line(arm: Arm) -> str:
    """An arm in one line, for those who wait."""
    parts = [f"{arm.name}: ASR {rate_text(arm.asr)} of {arm.asr.n}"]
    if arm.unparsed:
        parts.append(f"{arm.unparsed:.1%} not parsed")
    if arm.fidelity:
        parts.append(f"mean KL {arm.fidelity.mean_kl:.4f}")
    return ", ".join(parts)
