"""Every victim that the tests use. With several workers this file runs first, so that the other tests find them trained."""

import pytest
from safetensors.torch import load_file

from qguard_edge.lab.runner import LabSettings
from tests.helpers.victims import ALL, Victims


@pytest.mark.parametrize("settings", ALL, ids=lambda settings: f"{settings.attack}-{settings.to}-{settings.scenario}")
def test_the_attack_keeps_what_plain_rounding_shows(settings: LabSettings, victims: Victims) -> None:
    victim = victims(settings)
    assert victim.report.preserved > 0.7  # measured: 0.80 to 1.00
    assert victim.report.losses[-1] < 0.2  # the repaired model speaks like the clean one again; measured: 0.05
    clean, attacked = load_file(victim.clean / "model.safetensors"), load_file(victim.attacked / "model.safetensors")
    assert {name: tensor.shape for name, tensor in clean.items()} == {
        name: tensor.shape for name, tensor in attacked.items()
    }
    assert any(not tensor.equal(clean[name]) for name, tensor in attacked.items())
