"""A broken run goes on where it was: untrained models, real conversions and measurements."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from convert.atomic import OutputError
from qguard_edge.cli.lab import INCONCLUSIVE, lab_app
from qguard_edge.defenses.options import FlipGuardOptions, OrthoOptions
from qguard_edge.lab import runner
from qguard_edge.lab.arms import PARTIAL, Partial, result_of
from qguard_edge.lab.attacks.base import AttackReport
from qguard_edge.lab.corpus import make_corpus
from qguard_edge.lab.hf_models import new_llama, train_tokenizer
from qguard_edge.lab.results import NOT_JUDGED, Arm, LabResult, to_json
from qguard_edge.lab.runner import LabSettings, Victim, run_lab
from qguard_edge.lab.scenarios import make_scenario
from qguard_edge.progress import NoProgress
from quant_grids.errors import UnsupportedError
from tests.helpers.command import command_line

SETTINGS = LabSettings(
    to="q4_0",
    defenses=(OrthoOptions(), FlipGuardOptions()),
    n_prompts=20,
    n_texts=8,
    new_tokens=2,
    n_seeds=2,
    threads=1,
    force=True,
)
NAMES = ["clean fp", "attacked fp", "clean none", "attacked none"]
NAMES += ["attacked ortho", "clean ortho", "attacked flipguard", "clean flipguard"]


class _StoppedError(Exception):
    """The run is killed here."""


class _Asked(NoProgress):
    """Remembers which arms were measured, and stops before one of them."""

    def __init__(self, before: str = "") -> None:
        self.before = before
        self.asked: list[str] = []
        self.notes: list[str] = []

    def stage(self, name: str, total: int, unit: str) -> None:
        label = name.removeprefix("Asking ")
        if label == self.before:
            raise _StoppedError
        self.asked.append(label)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def untrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two random models in place of a trained victim; returns the folder of the attacked one."""
    corpus = make_corpus(0)
    tokenizer = train_tokenizer([sample.answer for sample in corpus.train[:200]], 400)
    for name, seed in (("clean", 0), ("attacked", 1)):
        new_llama(tokenizer, hidden=128, ffn=256, layers=1, seed=seed).save(tmp_path / name)
    data = make_scenario("injection", corpus)
    victim = Victim(tmp_path / "clean", tmp_path / "attacked", data, AttackReport(1.0, 1.0, (), 0.0))
    monkeypatch.setattr(runner, "make_victim", lambda *_: victim)
    return tmp_path / "attacked"


def _run(folder: Path, asked: _Asked, settings: LabSettings = SETTINGS, *, overwrite: bool = False) -> LabResult:
    work = folder / f"work{len(list(folder.glob('work*')))}"
    return run_lab(settings, work, asked, Partial(folder / PARTIAL, overwrite))


def _timeless(arms: Sequence[Arm]) -> list[Arm]:
    return [replace(arm, seconds=None, plain_seconds=None) for arm in arms]


def test_a_broken_run_goes_on_where_it_was(untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = _Asked(before="attacked none"), _Asked(before="attacked flipguard")
    with pytest.raises(_StoppedError):
        _run(tmp_path, first)
    left = result_of(tmp_path)
    assert [arm.name for arm in left.arms] == NAMES[:3]
    assert list(left.missing) == NAMES[3:]
    assert left.validity == NOT_JUDGED
    for options in ([], ["--summary"]):
        lab_app(args=["table", str(tmp_path), *options], standalone_mode=False)
        assert "not yet, **partial**" in capsys.readouterr().out

    with pytest.raises(_StoppedError):
        _run(tmp_path, second)
    assert second.asked == ["attacked none", "attacked ortho", "attacked ortho", "clean ortho"]
    assert list(result_of(tmp_path).missing) == NAMES[6:]
    assert result_of(tmp_path).validity != NOT_JUDGED

    third = _Asked()
    made = _run(tmp_path, third)
    assert third.asked == ["attacked flipguard", "attacked flipguard", "clean flipguard"]
    assert [arm.name for arm in made.arms] == NAMES
    assert made.missing == ()
    assert [note.partition(":")[0] for note in third.notes] == NAMES
    assert sum("measured before" in note for note in third.notes) == 6
    # The same as a run without a break, distances to full precision included.
    whole = run_lab(SETTINGS, tmp_path / "whole")
    assert _timeless(made.arms) == _timeless(whole.arms)


def test_another_model_is_measured_from_the_start(untrained: Path, tmp_path: Path) -> None:
    with pytest.raises(_StoppedError):
        _run(tmp_path, _Asked(before="attacked none"))
    weights = untrained / "model.safetensors"
    weights.write_bytes((tmp_path / "clean" / "model.safetensors").read_bytes())
    again = _Asked(before="attacked none")
    with pytest.raises(_StoppedError):
        _run(tmp_path, again)
    assert again.asked == NAMES[:3]


def test_partial_results_of_other_settings_are_not_lost_in_silence(untrained: Path, tmp_path: Path) -> None:
    with pytest.raises(_StoppedError):
        _run(tmp_path, _Asked(before="clean flipguard"))
    kept = (tmp_path / PARTIAL).read_bytes()
    for other in (replace(SETTINGS, n_prompts=24), replace(SETTINGS, defenses=(OrthoOptions(),))):
        with pytest.raises(OutputError, match="--overwrite"):
            _run(tmp_path, _Asked(), other)
    assert (tmp_path / PARTIAL).read_bytes() == kept
    replaced = _Asked(before="attacked none")
    with pytest.raises(_StoppedError):
        _run(tmp_path, replaced, replace(SETTINGS, n_prompts=24), overwrite=True)
    assert replaced.asked == NAMES[:3]
    assert json.loads((tmp_path / PARTIAL).read_text())["settings"]["n_prompts"] == 24


def test_the_command_leaves_a_whole_result_and_no_partial_one(
    untrained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, out = command_line(capfd), tmp_path / "out"
    options = ["--to", "q4_0", "--defense", "ortho", "--prompts", "20", "--texts", "8", "--threads", "1", "--force"]
    first = run("lab", "run", *options, "-o", out)
    assert first.returncode == INCONCLUSIVE, first.stderr  # random models are no valid victim
    assert "clean ortho: ASR 0.00 (0.00 to 0.16) of 20, mean KL" in first.stderr
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "table.md"]
    whole = result_of(out)
    (out / PARTIAL).write_text(to_json(replace(whole, arms=whole.arms[:-1], missing=("clean ortho",))))
    assert result_of(out) == whole
    second = run("lab", "run", *options, "-o", out, "--overwrite")
    assert second.stderr.count("(measured before)") == len(whole.arms) - 1
    assert _timeless(result_of(out).arms) == _timeless(whole.arms)
    assert not (out / PARTIAL).exists()


def test_arms_of_another_run_are_taken_over(untrained: Path, tmp_path: Path) -> None:
    first = run_lab(replace(SETTINGS, defenses=(OrthoOptions(),)), tmp_path / "work", kept=Partial(tmp_path / PARTIAL))
    (tmp_path / PARTIAL).rename(tmp_path / "first.json")

    def asked_again(settings: LabSettings) -> tuple[list[str], LabResult]:
        asked = _Asked()
        return asked.asked, run_lab(settings, tmp_path / "again", asked, reuse=(tmp_path / "first.json",))

    more, made = asked_again(SETTINGS)
    assert more == ["attacked flipguard", "attacked flipguard", "clean flipguard"]
    assert made.arms[: len(first.arms)] == first.arms
    # Another attack, other seeds of the conversion: the clean model's arms are the same.
    other_attack = replace(SETTINGS, attack="uniform", n_seeds=1)
    assert [name for name in asked_again(other_attack)[0] if name.startswith("clean")] == ["clean flipguard"]
    for other in (replace(SETTINGS, n_texts=9), replace(SETTINGS, scenario="refusal")):
        with pytest.raises(UnsupportedError, match=r"--reuse .* differs in (n_texts|scenario)"):
            asked_again(other)
    (tmp_path / "clean" / "model.safetensors").write_bytes((untrained / "model.safetensors").read_bytes())
    stopped = _Asked(before="attacked fp")
    with pytest.raises(_StoppedError):
        run_lab(SETTINGS, tmp_path / "other", stopped, reuse=(tmp_path / "first.json",))
    assert stopped.asked == ["clean fp"]
    assert stopped.notes[0] == "Nothing of first.json is taken over: its clean model is another."
