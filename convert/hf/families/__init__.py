"""The model families this converter knows; importing the package registers them all."""

from __future__ import annotations

from convert.hf.families import decoder, gemma, gpt2, mixture, phi
from convert.hf.families.family import INSTALL_FIRST, WAYS_OUT, Family, family_for
from convert.hf.families.part import Part, Setting

__all__ = ["INSTALL_FIRST", "MODULES", "WAYS_OUT", "Family", "Part", "Setting", "built_in", "family_for"]

MODULES = (decoder, mixture, gemma, phi, gpt2)
"""Where the families are; a family is registered when its module is imported."""


def built_in() -> list[type[Family]]:
    """The families that are built in, in the order of their definition."""
    return list(dict.fromkeys(Family.registry.values()))
