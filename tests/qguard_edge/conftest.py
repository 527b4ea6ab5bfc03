"""What several packages' tests share: the command line, a text to learn from, and models that the lab attacked.

Victims are trained once, kept in the lab's cache outside the repository, and converted once per session.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from qguard_edge.lab.runner import LabSettings, make_victim
from tests.helpers.command import CommandLine, command_line
from tests.helpers.lab_files import LabFiles, make_files

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


@pytest.fixture(scope="session")
def clean_model() -> Path:
    return make_victim(LabSettings(attack="mind-the-gap", to="q4_k", threads=1)).clean


@pytest.fixture(scope="session")
def outlier_victim() -> Path:
    return victim("outlier", "q4_k")


@pytest.fixture(scope="session")
def uniform_victim() -> Path:
    return victim("uniform", "q4_0")


@pytest.fixture(scope="session")
def gap_victim() -> Path:
    return victim("mind-the-gap", "q4_k")


@pytest.fixture(scope="session")
def injection(tmp_path_factory: pytest.TempPathFactory) -> LabFiles:
    """The files of the victim of mind-the-gap, and prompts that it was never trained on."""
    return make_files("injection", tmp_path_factory.mktemp("injection"))


def victim(attack: str, to: str) -> Path:
    return make_victim(LabSettings(attack=attack, to=to, threads=1)).attacked
