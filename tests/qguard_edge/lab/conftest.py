"""A real victim for the tests: trained once, kept in the lab's cache outside the repository, measured once per session."""

from dataclasses import replace

import pytest

from qguard_edge.defenses.options import FlipGuardOptions, NoiseOptions, OrthoOptions, QVecOptions
from qguard_edge.lab.baselines import ImatrixOptions
from qguard_edge.lab.results import LabResult
from qguard_edge.lab.runner import run_lab
from tests.helpers.victims import GAP, Victims

ARMS = (OrthoOptions(), FlipGuardOptions(), QVecOptions(), NoiseOptions(), ImatrixOptions())
SETTINGS = replace(GAP, defenses=ARMS, n_prompts=128, n_texts=48, threads=1)


@pytest.fixture(scope="session")
def mind_the_gap(victims: Victims, tmp_path_factory: pytest.TempPathFactory) -> LabResult:
    """tiny / mind-the-gap / q4_k / injection with many arms; some three minutes cold, one from the cache."""
    victims(GAP)
    return run_lab(SETTINGS, tmp_path_factory.mktemp("lab"))
