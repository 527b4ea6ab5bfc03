"""Shared models: a tiny random Llama with k-quant widths, and the real SmolLM2 from its package."""

import os
import sys
from pathlib import Path

import pytest

from convert.cores import available_cores
from tests.helpers.tiny_llama import make_tiny_folder

TRAINS = "victims"  # the fixture whose users may train a model
TRAINER = "lab/test_victims.py"  # asks for all of them
MAX_WORKERS = 4  # each takes up to 1.5 GB


def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a process per core."""
    return min(available_cores(), MAX_WORKERS)


def keep_to_a_core(worker: str) -> None:
    """Keep this process, worker `gw0`, `gw1`, ..., to a core of its own.

    The threads of llama.cpp and OpenMP spin while they wait. OpenMP counts the cores when it is loaded, so this comes before
    torch is: nothing that is imported here may import it.
    """
    assert "torch" not in sys.modules
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


if "PYTEST_XDIST_WORKER" in os.environ:
    keep_to_a_core(os.environ["PYTEST_XDIST_WORKER"])


# The distance to full precision at the end of a conversion is measured where a test asks for it: elsewhere it only costs time.
os.environ["QGUARD_NO_FIDELITY"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what may train; with workers, let one train all victims while the others go through what needs none."""
    users = {item for item in items if TRAINS in getattr(item, "fixturenames", ())}
    for item in users:
        item.add_marker(pytest.mark.training)
    if hasattr(config, "workerinput"):
        late = {item.path for item in users}
        items.sort(key=lambda item: 0 if item.path.as_posix().endswith(TRAINER) else 1 + (item.path in late))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("tied") / "tied", tied=True)


@pytest.fixture(scope="session")
def tiny_base(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from convert.hf.base import write_base_gguf

    path = tmp_path_factory.mktemp("base") / "tiny-bf16.gguf"
    write_base_gguf(tiny_folder, path)
    return path


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qguard_edge.lab.smollm2 import make_folder

    return make_folder(tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct")
