"""Models for the scan: clean ones made here, attacked ones from the lab's cache (trained once, outside the repository)."""

from pathlib import Path

import pytest

from qguard_edge.lab.runner import LabSettings, make_victim


def victim(attack: str, to: str) -> Path:
    return make_victim(LabSettings(attack=attack, to=to, threads=1)).attacked


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
