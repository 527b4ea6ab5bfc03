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


GROUP = 64


def codes_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix rounded to four bits in groups of a row: codes 0 to 15, scales and zero points f32 `[rows, groups]`."""
    groups = weight.float().view(len(weight), -1, GROUP)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(1, 15)
    codes = (groups / scale.unsqueeze(2) + zero.unsqueeze(2)).round().clamp(0, 15)
    return codes.view(weight.shape).int(), scale, zero.int()


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes along the last dimension in an i32, the first one in its lowest bits."""
    parts = codes.long().view(*codes.shape[:-1], -1, 8) << (4 * torch.arange(8))
    return parts.sum(-1).to(torch.uint32).view(torch.int32)


def stored_compressed(weight: torch.Tensor, symmetric: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """As compressed-tensors stores it (`pack-quantized`), and the values: zero points are packed along the rows."""
    codes, scale, zero = codes_of(weight)
    zero = torch.full_like(zero, 8) if symmetric else zero
    tensors = {"weight_packed": packed(codes), "weight_scale": scale.bfloat16(), "weight_shape": torch.tensor(weight.shape)}
    if not symmetric:
        tensors["weight_zero_point"] = packed(zero.T.contiguous()).T.contiguous()
    return tensors, _multiplied(codes, tensors["weight_scale"].float(), zero)


def stored_gptq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """As GPTQ stores it, and the values: codes are packed along the inputs; zero points, less one, along the outputs."""
    codes, scale, zero = codes_of(weight)
    tensors = {
        "qweight": packed(codes).T.contiguous(),
        "qzeros": packed((zero - 1).T.contiguous()),
        "scales": scale.T.contiguous().half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return tensors, _multiplied(codes, scale.half().float(), zero)


def _multiplied(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    groups = codes.view(len(codes), -1, GROUP) - zero.unsqueeze(2)
    return (groups * scale.unsqueeze(2)).view(codes.shape)


@pytest.mark.parametrize("kind", ["compressed-tensors, symmetric", "compressed-tensors, asymmetric", "gptq"])
def test_four_bits_in_groups(kind: str, cli: CommandLine, tmp_path: Path) -> None:
    """Refused without --allow-requantize; with it the base is codes times scales, and it is said what cannot be undone."""
    method, _, symmetric = kind.partition(", ")
    folder = tmp_path / "model"
    config = transformers.LlamaConfig(**standard(num_hidden_layers=1, tie_word_embeddings=False))
    weights = save(transformers.LlamaForCausalLM(config), folder)
    stored, values = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, weight in weights.items():
        if ".layers." not in name or weight.ndim != 2:
            stored[name] = weight
            continue
        tensors, values[name] = (
            stored_gptq(weight) if method == "gptq" else stored_compressed(weight, symmetric == "symmetric")
        )
        stored |= {name.removesuffix("weight") + part: tensor for part, tensor in tensors.items()}
    scheme = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": symmetric == "symmetric"}
    settings: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
    if method != "gptq":
        settings = {"quant_method": method, "format": "pack-quantized", "ignore": ["lm_head"]}
        settings["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    rewrite(folder, stored, settings)
    refused = cli("convert", folder, *OPTIONS, "-o", tmp_path / "out.gguf")
    assert refused.returncode == 2
    assert f"already quantized ({method})" in refused.stderr
    base, out = tmp_path / "base.gguf", tmp_path / "out.gguf"
    done = cli("convert", folder, "--to", "f32", "--allow-requantize", "--no-load-check", "--json", "-o", base)
    assert done.returncode == 0, done.stderr
    warnings = json.loads(done.stdout)["warnings"]
    assert [one for one in warnings if f"quantized before ({method})" in one and "cannot be undone" in one]
    for part in ("ffn_down", "ffn_up", "attn_v"):
        tensor = GgufModel(base).tensors[f"blk.0.{part}.weight"]
        raw = bytearray(base.read_bytes()[tensor.offset : tensor.offset + tensor.n_bytes])
        name = {"ffn_down": "mlp.down_proj", "ffn_up": "mlp.up_proj", "attn_v": "self_attn.v_proj"}[part]
        expected = values[f"model.layers.0.{name}.weight"]
        found = torch.frombuffer(raw, dtype=torch.float32).view(expected.shape)
        assert torch.allclose(found, expected, rtol=1e-2, atol=1e-6), part
        assert torch.allclose(found, weights[f"model.layers.0.{name}.weight"].float(), atol=float(expected.abs().max()) / 2)
    done = cli("convert", base, *OPTIONS, "-o", out)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["load_check"]["tokens"]
    assert said["protected_share"] == 1.0


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
