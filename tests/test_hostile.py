"""The quick form of the standing campaigns (`make fuzz` is the long one): some cases of each, always the same."""

import random
import subprocess
import sys

import pytest

from tests.hostile.cases import CAMPAIGNS
from tests.hostile.mutate import mutated_bytes, mutated_json, mutated_safetensors


@pytest.mark.usefixtures("no_hub")
def test_some_cases_of_every_campaign_hold() -> None:
    """In a process of its own: the campaign forks, and threads of other tests would be missing in its commands."""
    command = [sys.executable, "-m", "tests.hostile.campaign", "--rounds", "1", "--each", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"| {name} | 2 | 2 | 0 | " in done.stdout for name in CAMPAIGNS)
    assert "| kill | 1 | 1 | 0 | " in done.stdout


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QGUARD_OFFLINE", "1")


def test_the_same_seed_makes_the_same_fault() -> None:
    assert mutated_bytes(random.Random(1), bytes(100), 50) == mutated_bytes(random.Random(1), bytes(100), 50)
    assert mutated_json(random.Random(1), b'{"a": [1]}') == mutated_json(random.Random(1), b'{"a": [1]}')
    data = b"\x02" + bytes(7) + b"{}" + bytes(8)
    assert len({mutated_safetensors(random.Random(seed), data) for seed in range(20)}) > 5
