"""Checkpoints that are quantized already: refused, except FP8 with scales, which is multiplied out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.hf.base import describe_folder, write_base_gguf
from quant_grids.errors import FormatError, UnsupportedError
from tests.helpers.hf_models import CASES, make_model, save_model
from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

LLAMA = next(case for case in CASES if case.name == "llama")
TOKENIZER = train_byte_bpe(digits_then_bytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(LLAMA, make_model(LLAMA, dtype=torch.bfloat16), tmp_path / "m")
    save_tokenizer(TOKENIZER, tmp_path / "m")
    return tmp_path / "m"


def set_quantization(folder: Path, settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


@pytest.mark.parametrize(
    "method", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "hqq", "mxfp4", "quanto", "torchao"]
)
def test_quantized_checkpoints_are_refused_in_one_sentence(method: str, folder: Path) -> None:
    set_quantization(folder, {"quant_method": method})
    with pytest.raises(UnsupportedError, match=rf"already quantized \({method}\); convert the original") as caught:
        describe_folder(folder)
    assert str(caught.value).count(". ") == 0


def test_unnamed_methods_are_refused(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="modelopt"):
        describe_folder(folder)
    (folder / "hf_quant_config.json").unlink()
    set_quantization(folder, {"bits": 4})
    with pytest.raises(UnsupportedError, match="an unnamed method"):
        describe_folder(folder)


def test_weights_read_from_a_gguf_are_plain_but_reported(folder: Path) -> None:
    set_quantization(folder, {"quant_method": "gguf", "gguf_file": "model.Q4_1.gguf"})
    assert any("read from a GGUF" in warning for warning in describe_folder(folder).warnings)


def to_fp8(folder: Path, block: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """Stores every projection as FP8 with scales, as Qwen3's and DeepSeek's FP8 editions do; returns the exact values."""
    path = folder / "model.safetensors"
    weights, exact = load_file(path), {}
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        weight = weights[name].float()
        rows, columns = weight.shape
        height, width = block or (rows, columns)
        scale = torch.empty(-(-rows // height), -(-columns // width))
        stored, value = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                at = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                scale[i, j] = weight[at].abs().max() / 448
                stored[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
                value[at] = stored[at].float() * scale[i, j]
        weights[name], exact[name] = stored, value
        weights[f"{name}_scale_inv"] = scale if block else scale.reshape(())
        weights[f"{name.removesuffix('.weight')}.activation_scale"] = torch.ones(())
    save_file(weights, path, {"format": "pt"})
    set_quantization(folder, {"quant_method": "fp8", "weight_block_size": list(block) if block else None})
    return exact


# 128 x 96: blocks that do not divide the widths of 256 leave a narrower last column of blocks.
@pytest.mark.parametrize("block", [(128, 128), (128, 96), None])
def test_fp8_is_multiplied_out(block: tuple[int, int] | None, folder: Path, tmp_path: Path) -> None:
    exact = to_fp8(folder, block)
    report = write_base_gguf(folder, tmp_path / "b.gguf")
    assert report.base_type == "bf16"
    write_base_gguf(folder, tmp_path / "f32.gguf", base_type="f32")
    for path, dtype in ((tmp_path / "b.gguf", torch.bfloat16), (tmp_path / "f32.gguf", torch.float32)):
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for name, tensor_name in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
            stored = tensors[f"blk.1.{tensor_name}.weight"]
            value = gguf.quants.dequantize(stored.data, stored.tensor_type)
            expected = exact[f"model.layers.1.{name}.weight"].to(torch.bfloat16).float()
            assert np.array_equal(value, expected.numpy()), dtype


def change_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


NAME = "model.layers.0.mlp.up_proj.weight"


def test_fp8_without_its_scale(folder: Path) -> None:
    to_fp8(folder, (128, 128))
    change_weights(folder, lambda weights: weights.pop(f"{NAME}_scale_inv"))
    with pytest.raises(FormatError, match=r"has no .*_scale_inv"):
        describe_folder(folder)


def test_fp8_with_a_scale_of_the_wrong_shape(folder: Path) -> None:
    to_fp8(folder, (128, 128))
    change_weights(folder, lambda weights: weights.update({f"{NAME}_scale_inv": torch.ones(3, 3)}))
    with pytest.raises(FormatError, match=r"shape \[3, 3\].*calls for \[4, 2\]"):
        describe_folder(folder)


@pytest.mark.parametrize("size", [[128], [0, 128], "128", [128, -1], [128, 1 << 40]])
def test_fp8_with_an_odd_block_size(size: Any, folder: Path) -> None:
    to_fp8(folder, (128, 128))
    set_quantization(folder, {"quant_method": "fp8", "weight_block_size": size})
    with pytest.raises(FormatError, match="two positive integers"):
        describe_folder(folder)
