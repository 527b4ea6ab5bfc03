"""The arms of a run, one after the other: each is kept as soon as it is measured, so that a broken run goes on where it was.

What is measured so far lies in `results.partial.json`, a result like any other that names the arms it lacks; it is replaced
whole after every arm and removed when the run is through. A second call takes its arms over if its settings, the files of both
models and the versions of the libraries are the same. A defense's own code is *not* compared: whoever changes it removes the
file.
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

PARTIAL = "results.partial.json"
_FREE = ("defenses", "force")  # settings that no single arm depends on


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


def _compared(settings: Mapping[str, Any]) -> Any:
    """Settings as JSON gives them back, without those that no arm depends on."""
    return {key: value for key, value in json.loads(json.dumps(settings)).items() if key not in _FREE}


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
