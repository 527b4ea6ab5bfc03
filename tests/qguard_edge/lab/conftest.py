"""A real victim for the tests: trained once, kept in the lab's cache outside the repository, measured once per session."""

import pytest

from qguard_edge.defenses.options import OrthoOptions
from qguard_edge.lab.results import LabResult
from qguard_edge.lab.runner import LabSettings, run_lab

SETTINGS = LabSettings(defenses=(OrthoOptions(),), n_prompts=128, n_texts=48, threads=1)


@pytest.fixture(scope="session")
def mind_the_gap(tmp_path_factory: pytest.TempPathFactory) -> LabResult:
    """tiny / mind-the-gap / q4_k / injection with the arms none and ortho; some 150 seconds cold, 20 from the cache."""
    return run_lab(SETTINGS, tmp_path_factory.mktemp("lab"))
