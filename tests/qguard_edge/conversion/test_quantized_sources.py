"""Checkpoints that are quantized already: multiplied out, or kept as they are, by llama.cpp's converter; said plainly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from convert.gguf_file import GgufModel
from tests.helpers.command import CommandLine
from tests.helpers.hf_models import randomise, standard
from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

pytestmark = pytest.mark.usefixtures("installed_converter")
OPTIONS = ("--to", "q4_k", "--defense", "ortho", "--threads", "1", "--seed", "1", "--json")


def save(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    randomise(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(train_byte_bpe(digits_then_bytes()), folder)
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, weights: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def test_compressed_tensors_of_8_bits(cli: CommandLine, tmp_path: Path) -> None:
    """Refused without --allow-requantize; with it the base is the stored values times their scales."""
    folder = tmp_path / "model"
    config = transformers.LlamaConfig(**standard(num_hidden_layers=1, tie_word_embeddings=False))
    weights = save(transformers.LlamaForCausalLM(config), folder)
    stored = dict(weights)
    for name, weight in weights.items():
        if ".layers." in name and weight.ndim == 2:
            scale = weight.float().abs().amax(1, keepdim=True) / 127
            stored[name] = (weight.float() / scale).round().to(torch.int8)
            stored[f"{name}_scale"] = scale.bfloat16()
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    rewrite(folder, stored, settings)
    refused = cli("convert", folder, *OPTIONS, "-o", tmp_path / "out.gguf")
    assert refused.returncode == 2
    assert "already quantized (compressed-tensors)" in refused.stderr
    assert "--allow-requantize" in refused.stderr
    done = cli(
        "convert", folder, "--to", "f32", "--allow-requantize", "--no-load-check", "--json", "-o", tmp_path / "base.gguf"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [one for one in json.loads(done.stdout)["warnings"] if "first rounding" in one and "cannot be undone" in one]
    tensor = GgufModel(tmp_path / "base.gguf").tensors["blk.0.ffn_down.weight"]
    raw = (tmp_path / "base.gguf").read_bytes()[tensor.offset : tensor.offset + tensor.n_bytes]
    name = "model.layers.0.mlp.down_proj.weight"
    expected = stored[name].float() * stored[f"{name}_scale"].float()
    found = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(expected.shape)
    assert torch.allclose(found, expected, rtol=1e-2)


def test_mxfp4_experts_stay_as_they_are(cli: CommandLine, tmp_path: Path) -> None:
    """gpt-oss as published: its experts are kept bit for bit, everything else is rounded and protected, and that is said."""
    folder = tmp_path / "model"
    options = standard(
        num_local_experts=4, num_experts_per_tok=2, head_dim=64, intermediate_size=256, tie_word_embeddings=False
    )
    weights = save(transformers.GptOssForCausalLM(transformers.GptOssConfig(**options)), folder)
    generator = torch.Generator().manual_seed(0)
    stored = {name: weight for name, weight in weights.items() if not name.endswith(("gate_up_proj", "down_proj"))}
    for name, weight in weights.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            count, columns, rows = weight.shape  # input-first
            stored[f"{name}_blocks"] = torch.randint(
                0, 256, (count, rows, columns // 32, 16), dtype=torch.uint8, generator=generator
            )
            stored[f"{name}_scales"] = torch.full((count, rows, columns // 32), 120, dtype=torch.uint8)
    rewrite(folder, stored, {"quant_method": "mxfp4"})
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    done = cli("convert", folder, "--to", "bf16", "--no-load-check", "--json", "-o", base)
    assert done.returncode == 0, done.stderr
    assert [one for one in json.loads(done.stdout)["warnings"] if "quantized before (mxfp4)" in one]
    for more in (("--dry-run",), ()):
        done = cli("convert", base, *OPTIONS, *more, "-o", out)
        assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [one for one in said["warnings"] if "are MXFP4 already and stay as they are" in one]
    first, second = GgufModel(base), GgufModel(out)
    experts = [name for name in first.tensors if "_exps.weight" in name]
    assert len(experts) == 6
    for name in experts:
        before, after = first.tensors[name], second.tensors[name]
        assert before.ggml_type.name == after.ggml_type.name == "MXFP4"
        assert first.first.raw(before.offset, before.offset + before.n_bytes) == second.first.raw(
            after.offset, after.offset + after.n_bytes
        )
    assert said["protected_share"] == 1.0
    assert not [tensor for tensor in said["tensors"] if "_exps" in tensor["name"]]
