"""A tiny model with its plain file, as learning gets them."""

from pathlib import Path

import pytest
import torch

from tests.helpers.learned_setup import Setup, make_setup


@pytest.fixture(scope="module")
def setup(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return make_setup(tiny_folder, tmp_path_factory.mktemp("learned"), "q4_0")


@pytest.fixture
def samples() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(2, 300, (20,), generator=generator).tolist()) for _ in range(16)]
