"""Row mapping: every quantizable parameter of every family is found in the base GGUF, and values can be carried across."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from convert.hf.base import write_base_gguf
from convert.hf.checkpoint import Checkpoint
from convert.hf.rowmap import FolderParameters, RowMap
from convert.hf.rowsearch import map_rows
from quant_grids.errors import FormatError, UnsupportedError
from tests.helpers.hf_models import CASES, Case, make_model, save_model
from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

BY_NAME = {case.name: case for case in CASES}
TOKENIZER = train_byte_bpe(digits_then_bytes())
SHAPES = (
    "llama",
    "llama-biases",
    "qwen2",
    "qwen3-moe",
    "gemma2",
    "phi",
    "phi3",
    "starcoder-all-heads",
    "starcoder2",
    "gpt2",
)


def convert(case: Case, folder: Path, dtype: torch.dtype = torch.float32, base_type: str | None = None) -> tuple[Any, Path]:
    model = make_model(case, dtype=dtype)
    save_model(case, model, folder)
    save_tokenizer(TOKENIZER, folder)
    write_base_gguf(folder, folder / "base.gguf", base_type=base_type)
    return model, folder / "base.gguf"


def matrices(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, int(tensor.shape[0]))
        for tensor in gguf.GGUFReader(path).tensors
        if len(tensor.shape) > 1
    }


def check_values(rows: RowMap, parameters: dict[str, torch.Tensor], path: Path) -> None:
    """Gathering the parameters gives the GGUF's matrices, all of them."""
    for name, expected in matrices(path).items():
        assert rows.tensors[name].complete, name
        gathered = rows.tensors[name].gather(parameters)
        assert np.array_equal(gathered.float().numpy(), expected), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_matrix_is_mapped(case: Case, tmp_path: Path) -> None:
    model, base = convert(case, tmp_path)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    rows = map_rows(base, parameters)
    assert [found.name for found in rows.unmapped_parameters if parameters[found.name].ndim > 1] == []
    left = {found.name for found in rows.unmapped_tensors}
    assert all("norm" in name or name.endswith(".bias") or name.startswith("rope_") for name in left)
    check_values(rows, parameters, base)
    # Norms and biases are found too, unless they were changed (Gemma's 1 + w) or their elements reordered.
    changed = [found.name for found in rows.unmapped_parameters]
    assert bool(changed) == (case.family.startswith("Gemma") or case.name in ("llama-biases", "starcoder-all-heads"))


@pytest.mark.parametrize("name", SHAPES)
def test_folder_is_mapped_like_the_model(name: str, tmp_path: Path) -> None:
    _, base = convert(BY_NAME[name], tmp_path)
    folder = FolderParameters(Checkpoint.open(tmp_path))
    rows = map_rows(base, folder)
    assert [found.name for found in rows.unmapped_parameters if folder[found.name].ndim > 1] == []
    check_values(rows, dict(folder), base)
    assert len(folder) == len(list(folder))
    with pytest.raises(KeyError):
        folder["nothing"]


@pytest.mark.parametrize("name", SHAPES)
def test_values_are_carried_both_ways(name: str, tmp_path: Path) -> None:
    """Gradient-like values gathered into GGUF rows and scattered back arrive where they came from."""
    model, base = convert(BY_NAME[name], tmp_path)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    rows = map_rows(base, parameters)
    values = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    back = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for tensor in rows.tensors.values():
        if tensor.complete:
            tensor.scatter(tensor.gather(values), back)
    for name, parameter in parameters.items():
        if parameter.ndim > 1:
            assert torch.equal(back[name], values[name]), name


def test_shapes_of_the_correspondence(tmp_path: Path) -> None:
    model, base = convert(BY_NAME["qwen3-moe"], tmp_path / "moe")
    rows = map_rows(base, dict(model.named_parameters()))
    fused = "model.layers.0.mlp.experts.gate_up_proj"  # [4 experts, 2 * 256, 256]
    parts = dict(rows.of_parameter(fused))
    assert set(parts) == {"blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"}
    expert, row = 2, 17
    gate, up = parts["blk.0.ffn_gate_exps.weight"], parts["blk.0.ffn_up_exps.weight"]
    assert gate.parameter_rows[expert * 256 + row] == expert * 512 + row
    assert up.parameter_rows[expert * 256 + row] == expert * 512 + 256 + row

    model, base = convert(BY_NAME["llama"], tmp_path / "llama")
    rows = map_rows(base, dict(model.named_parameters()))
    ((tensor, source),) = rows.of_parameter("model.layers.1.self_attn.k_proj.weight")
    assert tensor == "blk.1.attn_k.weight"
    # RoPE pairs: GGUF row 1 of a head of 64 is the checkpoint's row 32.
    assert source.parameter_rows[:4].tolist() == [0, 32, 1, 33]

    model, base = convert(BY_NAME["gpt2"], tmp_path / "gpt2")
    rows = map_rows(base, dict(model.named_parameters()))
    ((tensor, source),) = rows.of_parameter("transformer.h.0.attn.c_attn.weight")
    assert (tensor, source.transposed) == ("blk.0.attn_qkv.weight", True)
    assert source.parameter_rows.tolist() == list(range(768))


@pytest.mark.parametrize(
    ("stored", "base_type", "loaded"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, "f32", torch.bfloat16),
        (torch.float16, None, torch.float32),
        (torch.float32, "bf16", torch.float32),
        (torch.float32, "f16", torch.float32),
        (torch.float32, "f32", torch.bfloat16),
    ],
)
def test_types_may_differ(stored: torch.dtype, base_type: str | None, loaded: torch.dtype, tmp_path: Path) -> None:
    model, base = convert(BY_NAME["llama"], tmp_path, stored, base_type)
    parameters = {name: parameter.detach().to(loaded) for name, parameter in model.named_parameters()}
    rows = map_rows(base, parameters)
    assert rows.unmapped_parameters == ()
    assert rows.unmapped_tensors == ()


def test_repeated_rows(tmp_path: Path) -> None:
    """Zero rows everywhere, a copied layer, an output matrix equal to the embedding: still one source for each row."""
    case = BY_NAME["qwen3-moe"]
    model = make_model(case)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.view(-1, parameter.shape[-1])[::3] = 0
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    save_model(case, model, tmp_path)
    save_tokenizer(TOKENIZER, tmp_path)
    write_base_gguf(tmp_path, tmp_path / "base.gguf")
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    rows = map_rows(tmp_path / "base.gguf", parameters)
    assert rows.unmapped_parameters == ()
    check_values(rows, parameters, tmp_path / "base.gguf")
    # The name map settles what the bytes cannot.
    assert [name for name, _ in rows.of_parameter("lm_head.weight")] == ["output.weight"]
    assert [name for name, _ in rows.of_parameter("model.layers.1.self_attn.o_proj.weight")] == ["blk.1.attn_output.weight"]


def test_one_parameter_in_two_tensors(tmp_path: Path) -> None:
    """A GGUF that repeats the tied embedding as an output matrix, as other converters write it."""
    model, base = convert(BY_NAME["llama-tied-mha"], tmp_path)
    writer = gguf.GGUFWriter(path=None, arch="llama")
    writer.add_block_count(2)
    for tensor in gguf.GGUFReader(base).tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
        if tensor.name == "token_embd.weight":
            writer.add_tensor("output.weight", np.array(tensor.data))
    writer.write_header_to_file(path=tmp_path / "twice.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rows = map_rows(tmp_path / "twice.gguf", dict(model.named_parameters()))
    assert {name for name, _ in rows.of_parameter("model.embed_tokens.weight")} == {"token_embd.weight", "output.weight"}
    assert rows.unmapped_tensors == ()


def test_what_is_nowhere_is_reported(tmp_path: Path) -> None:
    model, base = convert(BY_NAME["llama"], tmp_path)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parameters["model.layers.0.mlp.up_proj.weight"][5] += 1.0
    parameters["extra.weight"] = torch.randn(7, 256)
    parameters["steps"] = torch.tensor(3)
    rows = map_rows(base, parameters)
    assert {(left.name, left.rows, left.found) for left in rows.unmapped_parameters} == {
        ("model.layers.0.mlp.up_proj.weight", 512, 511),
        ("extra.weight", 7, 0),
    }
    assert [(left.name, left.found) for left in rows.unmapped_tensors] == [("blk.0.ffn_up.weight", 511)]
    assert not rows.tensors["blk.0.ffn_up.weight"].complete
    with pytest.raises(FormatError, match=r"blk\.0\.ffn_up\.weight has rows that no parameter holds"):
        rows.tensors["blk.0.ffn_up.weight"].gather(parameters)


def test_gguf_input_is_mapped_through_the_transformers_loader(tmp_path: Path) -> None:
    """For a `.gguf` input the torch model comes from transformers' own loader, which undoes the row order of q and k."""
    from transformers import AutoModelForCausalLM

    _, base = convert(BY_NAME["llama"], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf", dtype=torch.float32)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    rows = map_rows(base, parameters)
    assert rows.unmapped_parameters == ()
    check_values(rows, parameters, base)


def test_quantized_gguf_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(path=None, arch="llama")
    writer.add_tensor("output.weight", np.zeros((4, 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file(path=tmp_path / "q.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match=r"output\.weight is Q8_0"):
        map_rows(tmp_path / "q.gguf", {})
