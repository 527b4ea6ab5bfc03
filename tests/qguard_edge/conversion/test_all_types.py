"""Every file type that llama.cpp writes: hardened, within its target, loaded and decoded in llama.cpp."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.diff import compare_files
from convert.ftypes import FILE_TYPES, FileType
from convert.gguf_file import GgufFile, TensorInfo
from convert.imatrix_file import load_imatrix
from convert.quantizer import QuantizeError, QuantizeOptions
from convert.tensor_io import RowSlice
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import OrthoOptions
from qguard_edge.runtimes.imatrix import make_imatrix
from quant_grids import GRIDS
from tests.helpers.command import CommandLine
from tests.helpers.expected_targets import ortho_target

QUANTIZED = [file_type for file_type in FILE_TYPES if not file_type.base]
SEARCHED_FOR_SECONDS = {
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ2_M",
    "IQ3_XXS",
}  # by llama.cpp, in their lattices
CASES = [
    pytest.param(file_type, id=file_type.name, marks=[pytest.mark.training] * (file_type.name in SEARCHED_FOR_SECONDS))
    for file_type in QUANTIZED
]
TEXT = "The quick brown fox jumps over the lazy dog. def add(a, b): return a + b\n" * 40


@pytest.fixture(scope="module")
def imatrix(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imatrix")
    (folder / "text.txt").write_text(TEXT)
    make_imatrix(str(tiny_folder), folder / "text.txt", folder / "imatrix.gguf", chunk_size=64)
    return folder / "imatrix.gguf"


def request(base: Path, out: Path, file_type: FileType, imatrix: Path | None) -> GgufRequest:
    options = QuantizeOptions(file_type, threads=2, imatrix=imatrix)
    return GgufRequest(
        model=str(base), options=options, defense=OrthoOptions(), outfile=str(out), device="cpu", keep_plain=True, seed=1
    )


def check(base: Path, made: GgufRequest) -> set[str]:
    """Convert, hold the result to its target against the base, and return the types of the hardened tensors."""
    report = convert_model(made)
    assert report.coverage is not None
    assert not report.coverage.unprotected
    assert report.plain is not None
    assert report.loaded is not None
    assert report.loaded.tokens
    found = compare_files(report.plain, report.outfile, base=base)
    assert found.only_code_bits
    names = {rounding.name for rounding in report.roundings}
    for tensor in found.tensors:
        if tensor.name in names:
            tolerance = 0.01 if GRIDS[tensor.ggml_type].kind == "scalar" else 0.05
            name = tensor.ggml_type.name
            assert tensor.alignment == pytest.approx(ortho_target(name), abs=tolerance), (tensor.name, name)
    return {rounding.ggml_type.name for rounding in report.roundings}


def keep(rows: list[torch.Tensor], _tensor: TensorInfo, _rows: RowSlice, blocks: torch.Tensor) -> None:
    """A sink that keeps what it is given."""
    rows.append(blocks)


@pytest.mark.parametrize("file_type", CASES)
def test_every_type(tiny_base: Path, tmp_path: Path, imatrix: Path, file_type: FileType) -> None:
    types = check(
        tiny_base, request(tiny_base, tmp_path / "out.gguf", file_type, imatrix if file_type.needs_imatrix else None)
    )
    if file_type.name != "MXFP4_MOE":  # which only touches experts; see below
        assert file_type.main in types


@pytest.mark.parametrize("ggml_type", ["mxfp4", "nvfp4", "q2_0", "q1_0", "tq1_0"])
def test_types_chosen_per_tensor(tiny_base: Path, tmp_path: Path, ggml_type: str) -> None:
    """Types that a mixture gives to few tensors or to none, forced on all."""
    made = request(tiny_base, tmp_path / "out.gguf", QUANTIZED[2], None)
    made = replace(made, options=replace(made.options, tensor_types=((r"blk\..*", ggml_type),)))
    assert ggml_type.upper() in check(tiny_base, made)


@pytest.mark.parametrize("file_type", [f for f in QUANTIZED if f.needs_imatrix], ids=lambda file_type: file_type.name)
def test_types_that_need_an_imatrix_say_so(tiny_base: Path, tmp_path: Path, file_type: FileType) -> None:
    with pytest.raises(QuantizeError, match=rf"^{file_type.name} needs an importance matrix: pass --imatrix"):
        convert_model(request(tiny_base, tmp_path / "out.gguf", file_type, None))
    assert list(tmp_path.iterdir()) == []


def test_imatrix_is_the_mean_square_of_each_input(tiny_folder: Path, imatrix: Path) -> None:
    """Held against activations taken with a hook on one layer, and against the names in the base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = load_imatrix(imatrix)
    assert loaded.chunk_count > 1
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(tiny_folder)(TEXT, add_special_tokens=False)["input_ids"]
    seen = []
    layer = model.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].reshape(-1, 512)))
    with torch.inference_mode():
        for start in range(0, len(ids), 64):
            model(torch.tensor([ids[start : start + 64]]))
    expected = torch.cat(seen).square().mean(0).numpy()
    # llama.cpp rounds the inputs of bf16 matrices to bf16; tests/qguard_edge/runtimes/test_imatrix.py compares in f32.
    assert loaded.entries["blk.1.ffn_down.weight"] == pytest.approx(expected, rel=0.1)
    assert np.linalg.norm(loaded.entries["blk.1.ffn_down.weight"] - expected) < 0.01 * np.linalg.norm(expected)
    assert len(loaded.entries) == 14


def test_imatrix_moves_the_flips_to_cheap_columns(tiny_base: Path, tmp_path: Path, imatrix: Path) -> None:
    """With weights, the added error (weighted) is lower than what the unweighted choice adds, on the same plain."""
    from convert.gguf_file import GgufModel
    from convert.tensor_io import open_reader, row_slices
    from qguard_edge.defenses.base import make_defense
    from qguard_edge.rounding.gguf import WalkOptions, coverage_of, harden

    file_type = next(f for f in QUANTIZED if f.name == "Q4_K_M")
    plain_path = convert_model(request(tiny_base, tmp_path / "out.gguf", file_type, imatrix)).plain
    assert plain_path is not None
    base, plain, weights = GgufModel(tiny_base), GgufFile(plain_path), load_imatrix(imatrix)
    (tensor,) = [t for t in coverage_of(base, plain).protected if t.name == "blk.0.ffn_down.weight"]
    added = {}
    for name, table in (("weighted", weights), ("plain", None)):
        rows: list[torch.Tensor] = []
        harden(base, plain, (tensor,), make_defense(OrthoOptions(width=0.0)),
               WalkOptions(1, threads=1, imatrix=table), sink=partial(keep, rows))  # fmt: skip
        with open_reader(plain.path, tiny_base) as reader:
            (part,) = row_slices(tensor, tensor.n_weights)
            grid = GRIDS[tensor.ggml_type]
            full = reader.weights(base.tensors[tensor.name], part)
            before = grid.dequantize(reader.blocks(tensor, part)).view(full.shape) - full
            after = grid.dequantize(torch.cat(rows)).view(full.shape) - full
        importance = torch.from_numpy(np.array(weights.entries[tensor.name]))
        added[name] = float(((after**2 - before**2) * importance).sum())
        assert float((after * before).sum() / (before**2).sum()) == pytest.approx(0.0, abs=0.01)
    assert added["weighted"] < 0.9 * added["plain"]


def test_types_command_lists_them_all(cli: CommandLine) -> None:
    done = cli("types", "--json")
    listed = {entry["name"]: entry for entry in json.loads(done.stdout)["types"]}
    assert listed.keys() == {file_type.name for file_type in FILE_TYPES}
    assert all(entry["protection"] in ("scalar", "lattice", "not rounded") for entry in listed.values())
