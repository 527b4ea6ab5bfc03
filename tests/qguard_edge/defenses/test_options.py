"""Defenses written as text, for the laboratory's `--defense`."""

import pytest

from qguard_edge.defenses.options import OrthoOptions, QuantGuardOptions, QVecOptions, parse_defense
from quant_grids.errors import UnsupportedError


def test_a_name_alone_has_its_defaults() -> None:
    assert parse_defense("ortho") == OrthoOptions()
    assert parse_defense(" quantguard ") == QuantGuardOptions()


def test_options_follow_after_colons() -> None:
    assert parse_defense("quantguard:steps=0:alignment=-0.5") == QuantGuardOptions(steps=0, alignment=-0.5)
    assert parse_defense("quantguard:checkpointing=true:scope=block").label == "quantguard scope=block checkpointing=True"
    assert parse_defense("ortho:target=0.25") == OrthoOptions(target=0.25)
    assert parse_defense("qvec:strength=0.5") == QVecOptions(strength=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("voodoo", "choose one of"),
        ("ortho:breadth=1", "ortho has no option 'breadth'; its options are: .*target"),
        ("none:x=1", "its options are: none"),
        ("quantguard:steps=many", "'many' is no value for quantguard's option steps"),
        ("quantguard:steps", "is no value"),
        ("quantguard:steps=-1", "must lie between"),
        ("quantguard:scope=house", "choose one of model, block"),
    ],
)
def test_what_cannot_be_understood(text: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        parse_defense(text)
