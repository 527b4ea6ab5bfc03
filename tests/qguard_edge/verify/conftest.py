"""A real backdoored model, made once per session from the lab's cache."""

import pytest
from lab_files import LabFiles, make_files


@pytest.fixture(scope="session")
def injection(tmp_path_factory: pytest.TempPathFactory) -> LabFiles:
    return make_files("injection", tmp_path_factory.mktemp("injection"))
