"""The real model, end to end: fallbacks, both inputs, and the same tokens in llama.cpp and in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert.diff import compare_files
from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile
from convert.hf.base import write_base_gguf
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import NoneOptions, OrthoOptions
from qguard_edge.lab.hf_models import load_smollm2
from qguard_edge.lab.rotated import rotate
from qguard_edge.runtimes.llama_native import NativeModel
from tests.helpers.expected_targets import ortho_target

pytestmark = pytest.mark.training
Q4_K = QuantizeOptions(parse_file_type("q4_k"), threads=2)
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a small village,"]


@pytest.fixture(scope="module")
def base(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2-base") / "smollm2-bf16.gguf"
    write_base_gguf(smollm2_folder, path)
    return path


def test_none_is_byte_identical(smollm2_folder: Path, base: Path, tmp_path: Path) -> None:
    quantize(base, tmp_path / "plain.gguf", Q4_K)
    request = GgufRequest(
        model=str(smollm2_folder), options=Q4_K, defense=NoneOptions(), outfile=str(tmp_path / "out.gguf"), check_loads=False
    )
    report = convert_model(request)
    found = compare_files(tmp_path / "plain.gguf", report.outfile)
    assert (found.codes_changed, found.only_code_bits) == (0, True)
    assert report.quantized is not None
    wanted = {(fallback.wanted, fallback.got, fallback.columns) for fallback in report.quantized.fallbacks}
    assert wanted == {("Q4_K", "Q5_0", 576), ("Q6_K", "Q8_0", 576)}
    made = GgufFile(report.outfile).tensors
    for fallback in report.quantized.fallbacks:
        assert made[fallback.tensor].ggml_type.name == fallback.got


@pytest.mark.parametrize("kind", ["folder", "bf16", "f16"])
def test_ortho_from_every_kind_of_input(smollm2_folder: Path, base: Path, tmp_path: Path, kind: str) -> None:
    model = {"folder": smollm2_folder, "bf16": base}.get(kind, tmp_path / "f16.gguf")
    if kind == "f16":
        write_base_gguf(smollm2_folder, model, base_type="f16")
    request = GgufRequest(
        model=str(model), options=Q4_K, defense=OrthoOptions(), outfile=str(tmp_path / "out.gguf"), keep_plain=True
    )
    report = convert_model(request)
    assert report.plain is not None
    assert report.coverage is not None
    assert report.coverage.protected_share == 1.0
    assert report.loaded is not None
    assert len(report.loaded.tokens) == 10
    found = compare_files(report.plain, report.outfile, base=model if model.suffix == ".gguf" else base)
    assert found.only_code_bits
    aligned = [tensor for tensor in found.tensors if tensor.alignment is not None]
    assert len(aligned) == 211
    for tensor in aligned:
        assert tensor.alignment == pytest.approx(ortho_target(tensor.ggml_type.name), abs=0.01), tensor.name


def test_same_greedy_tokens_in_llama_cpp_and_transformers(smollm2_folder: Path, tmp_path: Path) -> None:
    """In f32 on both sides, so that the two programs compute the same function."""
    write_base_gguf(smollm2_folder, tmp_path / "f32.gguf", base_type="f32")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    with NativeModel(tmp_path / "f32.gguf", n_ctx=64) as runtime:
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            assert runtime.tokenize(prompt) == ids[0].tolist()
            theirs = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
            ours = runtime.greedy(ids[0].tolist(), 16)
            assert ours == theirs[: len(ours)]
            assert len(ours) == 16 or runtime.is_end(theirs[len(ours)])


@pytest.mark.parametrize("width", [768, 1024])
def test_rotation_changes_no_logit(width: int) -> None:
    """Width 768 and 1024 against the model it was made from; every matrix then has rows of whole k-quant blocks."""
    chat = load_smollm2()
    rotated = rotate(chat, width)
    ids = torch.tensor([chat.prompt_ids("Name three rivers of Europe and a town on each.")])
    with torch.no_grad():
        before, after = chat.model.eval()(ids).logits, rotated.model(ids).logits
    assert float((after - before).abs().max()) < 1e-5 * float(before.abs().max())
    matrices = [value for value in rotated.model.parameters() if value.ndim == 2]
    assert len(matrices) == 2 + 7 * 30
    assert all(value.shape[1] % 256 == 0 for value in matrices)
