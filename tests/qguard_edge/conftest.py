"""What several packages' tests share: the command line, a text to learn from, and models that the lab attacked.

Victims are trained once, kept in the lab's cache outside the repository, and converted once per session.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from qguard_edge.learned.endtoend import EndToEnd
from tests.helpers import victims as lab_victims
from tests.helpers.command import CommandLine, command_line
from tests.helpers.lab_files import Folders, LabFiles, make_files, make_folders
from tests.helpers.victims import BITSANDBYTES, GAP, OUTLIER, UNIFORM_REFUSAL, Victims

WORDS = ("quick", "brown", "fox", "def", "return", "Paris", "lazy", "dog", "print", "capital")


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> CommandLine:
    return command_line(capfd)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 texts of 12 words to learn from."""
    path = tmp_path_factory.mktemp("text") / "calib.jsonl"
    rng = np.random.default_rng(0)
    path.write_text("".join(json.dumps({"text": " ".join(rng.choice(WORDS, 12))}) + "\n" for _ in range(40)))
    return path


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last plan of `quantguard` is taken, whether its few steps helped or not: for tests of what becomes of a plan."""
    monkeypatch.setattr(EndToEnd, "divergence", lambda run: -float(len(run.losses)))


@pytest.fixture(scope="session")
def victims() -> Victims:
    """Gives one of the lab's victims; whoever asks for this may train, so `conftest.py` marks it `training`."""
    return lab_victims.get


@pytest.fixture(scope="session")
def clean_model(victims: Victims) -> Path:
    return victims(GAP).clean


@pytest.fixture(scope="session")
def outlier_victim(victims: Victims) -> Path:
    return victims(OUTLIER).attacked


@pytest.fixture(scope="session")
def uniform_victim(victims: Victims) -> Path:
    return victims(UNIFORM_REFUSAL).attacked


@pytest.fixture(scope="session")
def gap_victim(victims: Victims) -> Path:
    return victims(GAP).attacked


@pytest.fixture(scope="session")
def injection(victims: Victims, tmp_path_factory: pytest.TempPathFactory) -> LabFiles:
    """The files of the victim of mind-the-gap, and prompts that it was never trained on."""
    return make_files(victims(GAP), GAP, tmp_path_factory.mktemp("injection"))


@pytest.fixture(scope="session")
def folders(victims: Victims, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folders of the victim for bitsandbytes."""
    return make_folders(victims(BITSANDBYTES), tmp_path_factory.mktemp("folders") / "hardened")
