"""A base whose weights are moved so that the unmodified llama-quantize rounds them to the chosen codes."""

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from convert.diff import compare_files
from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile, GgufModel
from convert.quantizer import QuantizeOptions, quantize
from convert.tensor_io import open_reader, row_slices
from qguard_edge.conversion.naming import plain_path
from qguard_edge.conversion.report import MovedGgufReport
from qguard_edge.conversion.request import GgufRequest, MovedGgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import DefenseOptions, FlipGuardOptions, NoneOptions, OrthoOptions, QVecOptions
from qguard_edge.rounding.gguf import total_outcome
from quant_grids import GRIDS, Outcome
from quant_grids.errors import UnsupportedError

LEGACY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def request_for(base: Path, to: str, outfile: Path, defense: DefenseOptions | None = None) -> MovedGgufRequest:
    options = QuantizeOptions(parse_file_type(to), pure=True, threads=2)
    return MovedGgufRequest(
        model=str(base), options=options, defense=defense or OrthoOptions(), outfile=str(outfile), seed=3, check_loads=False
    )


def alignment_of(report: MovedGgufReport) -> float:
    return Outcome.sum(tensor.outcome for tensor in report.tensors).alignment


@pytest.mark.parametrize("to", LEGACY)
def test_legacy_types_reach_every_code(tiny_base: Path, tmp_path: Path, to: str) -> None:
    report = convert_model(request_for(tiny_base, to, tmp_path / "moved.gguf"))
    weights = sum(tensor.n_weights for tensor in report.tensors)
    moved = sum(tensor.n_moved for tensor in report.tensors)
    assert moved > 0.1 * weights
    assert sum(tensor.reached for tensor in report.tensors) >= 0.999 * moved
    assert sum(tensor.codes for tensor in report.tensors) >= 0.99 * weights  # the extremes keep their own
    assert abs(total_outcome(report.chosen).alignment) < 0.01
    assert abs(alignment_of(report)) < 0.02
    assert report.warnings == ()


@pytest.mark.parametrize("to", ["q3_k_m", "q4_k", "q6_k", "iq4_nl"])
def test_searched_types_turn_the_error_and_say_what_was_reached(tiny_base: Path, tmp_path: Path, to: str) -> None:
    report = convert_model(request_for(tiny_base, to, tmp_path / "moved.gguf"))
    reached = sum(tensor.reached for tensor in report.tensors) / sum(tensor.n_moved for tensor in report.tensors)
    assert 0.6 < reached < 0.999
    assert alignment_of(report) < 0.15
    assert any(f"{reached:.0%} of the chosen flips" in warning for warning in report.warnings)


def test_the_report_is_what_llama_cpp_does_with_the_file(tiny_base: Path, tmp_path: Path) -> None:
    """Quantize the moved base by hand, and count against a conversion with the same seed."""
    request = request_for(tiny_base, "q4_0", tmp_path / "moved.gguf")
    report = convert_model(request)
    made, plain, again = tmp_path / "hardened.gguf", tmp_path / "plain.gguf", tmp_path / "again.gguf"
    asked = GgufRequest(
        model=request.model,
        options=request.options,
        defense=request.defense,
        outfile=str(made),
        seed=request.seed,
        check_loads=False,
        keep_plain=True,
    )
    convert_model(asked)
    quantize(tmp_path / "moved.gguf", again, request.options)
    quantize(tiny_base, plain, request.options)
    by_name = {tensor.name: tensor for tensor in report.tensors}
    for tensor in compare_files(made, again).tensors:
        if tensor.name in by_name:
            assert tensor.n_weights - tensor.codes_changed == by_name[tensor.name].codes
    for tensor in compare_files(plain, again, base=tiny_base).tensors:
        if tensor.name in by_name:
            assert tensor.foreign_bytes == 0  # the scales are those of the original
            assert tensor.alignment == pytest.approx(by_name[tensor.name].outcome.alignment, abs=1e-4)
    assert plain.read_bytes() == plain_path(made).read_bytes()


def test_weights_move_by_less_than_a_step_and_only_where_codes_changed(tiny_base: Path, tmp_path: Path) -> None:
    request = request_for(tiny_base, "q4_0", tmp_path / "moved.gguf", FlipGuardOptions())
    report = convert_model(request)
    plain = tmp_path / "plain.gguf"
    quantize(tiny_base, plain, request.options)
    base, moved, plain_file = GgufModel(tiny_base), GgufModel(tmp_path / "moved.gguf"), GgufFile(plain)
    with open_reader(tiny_base, tmp_path / "moved.gguf", plain) as reader:
        for record in report.tensors:
            (part,) = row_slices(plain_file.tensors[record.name])
            before = reader.weights(base.tensors[record.name], part)
            after = reader.weights(moved.tensors[record.name], part)
            grid = GRIDS[GGMLQuantizationType.Q4_0]
            step = grid.steps(reader.blocks(plain_file.tensors[record.name], part)).repeat_interleave(32).view(before.shape)
            assert int((before != after).sum()) == record.n_moved
            assert bool(((after - before).abs() <= step).all())


def test_without_a_defense_nothing_moves(tiny_base: Path, tmp_path: Path) -> None:
    report = convert_model(request_for(tiny_base, "q4_k", tmp_path / "moved.gguf", NoneOptions()))
    for tensor in report.tensors:
        assert (tensor.n_moved, tensor.codes, tensor.outcome.alignment) == (0, tensor.n_weights, 1.0)


def test_a_folder_works_and_defenses_that_move_weights_choose_codes_here(tiny_folder: Path, tmp_path: Path) -> None:
    report = convert_model(request_for(tiny_folder, "q8_0", tmp_path / "{ftype}.gguf", QVecOptions()))
    assert report.outfile == tmp_path / "q8_0.gguf"
    assert report.outfile.is_file()
    assert any("fixed-grid" in warning for warning in report.warnings)
    assert [path.name for path in tmp_path.iterdir()] == ["q8_0.gguf"]


def test_types_that_share_codes_are_refused_and_nothing_is_left(tiny_base: Path, tmp_path: Path) -> None:
    request = request_for(tiny_base, "iq3_s", tmp_path / "moved.gguf")
    with pytest.raises(UnsupportedError, match="shared by several weights"):
        convert_model(request)
    assert list(tmp_path.iterdir()) == []
