"""Models of several parts through convert, diff and verify: many experts, a head for further tokens, vision beside language."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from convert.gguf_file import GgufModel
from convert.hashes import sha256_of
from qguard_edge.runtimes.load_check import LoadCheckError, load_pair
from tests.helpers.command import CommandLine
from tests.helpers.hf_models import PROMPTS, randomise, standard
from tests.helpers.hf_sentencepiece import to_json, train_sentencepiece
from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "head_dim": 64,
}


def save(model: Any, folder: Path) -> Path:
    """The model with random weights and a tokenizer."""
    randomise(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(train_byte_bpe(digits_then_bytes()), folder)
    return folder


def base_of(folder: Path, cli: CommandLine, *more: str) -> Path:
    """The full-precision GGUF of a folder."""
    base = folder.with_name("base.gguf")
    done = cli("convert", folder, "--to", "bf16", "-o", base, "--no-load-check", "--quiet", *more)
    assert done.returncode == 0, done.stderr
    return base


def through_all(source: Path, base: Path, cli: CommandLine, *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """convert -> diff -> verify by the default defense; what the first two say."""
    made, plain, text = (base.with_name(name) for name in ("made.gguf", "made.plain.gguf", "text.txt"))
    text.write_text("\n\n".join(PROMPTS * 10))
    done = cli(
        "convert", source, "--to", "q4_k", "--seed", "1", "--threads", "1", "--keep-plain", "--json", "--no-scan", "-o", made,
        "--calib", text, "--calib-samples", "8", "--calib-seqlen", "64", *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["load_check"]["tokens"]
    assert said["protected_share"] == 1.0
    found = json.loads(cli("diff", plain, made, "--base", base, "--json").stdout)
    assert found["only_code_bits"]
    asked = cli(
        "verify", made, "--base", base, "--plain", plain, "--suites", "drift", "--limit", "2", "--threads", "1", "--json"
    )  # fmt: skip
    assert json.loads(asked.stdout)["verdict"] in ("pass", "inconclusive"), asked.stderr
    return said, found


def changed_in(found: dict[str, Any], part: str) -> set[str]:
    """Tensors with `part` in their name whose codes were chosen anew."""
    return {tensor["name"] for tensor in found["tensors"] if part in tensor["name"] and tensor["codes_changed"]}


def test_a_mixture_of_32_experts(cli: CommandLine, tmp_path: Path) -> None:
    options = standard(
        head_dim=64, moe_intermediate_size=256, num_experts=32, num_experts_per_tok=4, norm_topk_prob=True, num_hidden_layers=1
    )  # fmt: skip
    folder = save(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**options)), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.gate.weight"][5] = 0  # of 32 random scores, four are above that of this expert
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    base = base_of(folder, cli)
    assert GgufModel(base).tensors["blk.0.ffn_up_exps.weight"].shape == (256, 256, 32)
    said, found = through_all(base, base, cli)
    idle = said["activations"]["idle_experts"]
    assert set(idle) == {f"blk.0.ffn_{name}_exps.weight" for name in ("gate", "up", "down")}
    assert all(5 in experts and len(experts) < 16 for experts in idle.values())
    share = 3 * 256 * 256 * len(idle["blk.0.ffn_up_exps.weight"]) / GgufModel(base).n_weights
    named = ", ".join(map(str, idle["blk.0.ffn_up_exps.weight"]))
    count = len(idle["blk.0.ffn_up_exps.weight"])
    expected = f"the text never reached {count} experts, {share:.1%} of the weights (layer 0: {named})"
    assert [one for one in said["warnings"] if one.startswith(expected)]
    assert changed_in(found, "_exps") == {f"blk.0.ffn_{name}_exps.weight" for name in ("gate", "up", "down")}


@pytest.mark.usefixtures("installed_converter")
def test_a_head_that_predicts_further_tokens(cli: CommandLine, tmp_path: Path) -> None:
    """It is converted and kept; nothing runs it on the text, so its matrices are named, and rounded without their inputs."""
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    config = transformers.Qwen3_5TextConfig(
        **standard(**LINEAR, num_hidden_layers=4, layer_types=kinds, tie_word_embeddings=False)
    )
    folder = save(transformers.Qwen3_5ForCausalLM(config), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    last = "model.layers.3."
    head = {name.replace(last, "mtp.layers.0."): weights[name] + 0.01 for name in weights if name.startswith(last)}
    head |= {
        f"mtp.{name}.weight": weights["model.norm.weight"].clone()
        for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")
    }
    head["mtp.fc.weight"] = torch.randn(256, 512, generator=torch.Generator().manual_seed(1)).bfloat16() / 23
    save_file({**weights, **head}, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"mtp_num_hidden_layers": 1}))
    base = base_of(folder, cli)
    model = GgufModel(base)
    assert model.first.value("qwen35.nextn_predict_layers") == 1
    assert "blk.4.nextn.eh_proj.weight" in model.tensors
    said, found = through_all(base, base, cli)
    of_head = changed_in(found, "blk.4.")
    assert {"blk.4.nextn.eh_proj.weight", "blk.4.attn_q.weight", "blk.4.ffn_down.weight"} <= of_head
    assert of_head <= set(said["activations"]["unseen"])


@pytest.mark.usefixtures("installed_converter")
def test_vision_beside_language(cli: CommandLine, tmp_path: Path) -> None:
    """The language half is hardened, the other one lies beside it, and llama.cpp's multimodal library takes the pair."""
    text = standard(head_dim=64, query_pre_attn_scalar=64, num_hidden_layers=2, vocab_size=600, sliding_window=128)
    vision = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
        "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model: Any = transformers.Gemma3ForConditionalGeneration(config)
    randomise(model)
    folder = tmp_path / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    to_json(train_sentencepiece("bpe"), folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_seq_length": 4, "size": {"height": 56, "width": 56}}
        )
    )
    base = base_of(folder, cli)
    said, found = through_all(folder, base, cli, "--mmproj", "f16", "--card", str(tmp_path / "README.md"))
    half = tmp_path / said["mmproj"]
    assert half.name == "mmproj-model-F16.gguf"
    assert said["load_check"]["halves"] == ["vision"]
    assert GgufModel(half).first.value("general.type") == "mmproj"
    assert not any(name.startswith(("v.", "mm.")) for name in GgufModel(base).tensors)
    assert changed_in(found, "blk.1.")
    card = (tmp_path / "README.md").read_text()
    assert (
        f"| `made.gguf` | language model | Q4_K_M | 100.0% of the rounded weights, `feedback` | `{said['sha256']['output']}` |"
        in card
    )
    assert (
        f"| `{half.name}` | vision half (`--mmproj`) | F16 | no: as llama.cpp's converter wrote it | `{sha256_of([half])}` |"
        in card
    )
    assert "llama-mtmd-cli -m made.gguf --mmproj mmproj-model-F16.gguf" in card
    assert "The other half of the model is not protected." in card


def test_the_other_half_is_asked_for_where_there_is_none(
    cli: CommandLine, tiny_folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    for source, said in ((tiny_folder, "no vision or audio half"), (tiny_base, "a GGUF has none")):
        done = cli("convert", source, "--to", "q4_0", "--defense", "none", "--mmproj", "f16", "-o", tmp_path / "out.gguf")
        assert done.returncode == 2
        assert said in " ".join(done.stderr.split())
        assert list(tmp_path.iterdir()) == []


def test_a_pair_that_is_none_or_hangs_is_one_sentence(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadCheckError, match=r"cannot use tiny-bf16\.gguf with the model: llama\.cpp ended with status 1"):
        load_pair(tiny_base, tiny_base)
    monkeypatch.setenv("QGUARD_LLAMA_SECONDS", "0.05")
    monkeypatch.setattr("convert.child.TICK", 0.02)
    with pytest.raises(LoadCheckError, match="without a sign of life"):
        load_pair(tiny_base, tiny_base)
