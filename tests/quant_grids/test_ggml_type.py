"""Type numbers beyond gguf's enum."""

import pytest
from gguf import GGMLQuantizationType

from quant_grids import GRIDS, grid_for
from quant_grids.errors import FormatError, UnsupportedError
from quant_grids.ggml_type import NEWER_SIZES, NewerType, layout_of, type_of


def test_gguf_s_own_types_come_first() -> None:
    for member in GGMLQuantizationType:
        assert type_of(int(member)) is member


def test_newer_types_work_like_gguf_s() -> None:
    """Looked up by number or by either enum, so that a gguf that learns the type changes nothing."""
    for member in NewerType:
        assert type_of(int(member)) == member
        assert type_of(int(member)).name == member.name
        assert layout_of(type_of(int(member))) == NEWER_SIZES[member]
        assert grid_for(member) is GRIDS[type_of(int(member))]
        assert grid_for(member).name == member.name


def test_unknown_numbers_and_types_without_a_grid_are_sentences() -> None:
    with pytest.raises(FormatError, match="1000 is not a ggml storage type"):
        type_of(1000)
    with pytest.raises(UnsupportedError, match="F16 has no grid"):
        grid_for(GGMLQuantizationType.F16)
    assert layout_of(GGMLQuantizationType.Q4_K) == (256, 144)
