"""The base GGUF as a whole: types, metadata, shards, names, greedy tokens; and the real SmolLM2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.gguf_file import GgufModel
from convert.hf.base import BaseReport, describe_folder, write_base_gguf
from quant_grids.errors import FormatError, UnsupportedError
from tests.helpers.hf_llama import exact_llama
from tests.helpers.hf_models import CASES, PROMPTS, Case, make_model, reference_logits, relative_error, save_model
from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

BY_NAME = {case.name: case for case in CASES}
TOKENIZER = train_byte_bpe(digits_then_bytes())


def make_folder(case: Case, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    model = make_model(case, dtype=dtype)
    save_model(case, model, folder)
    save_tokenizer(TOKENIZER, folder, **settings)
    return model


def fields(path: Path) -> dict[str, Any]:
    file = GgufModel(path).first
    return {key: file.value(key) for key in file.fields}


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    make_folder(BY_NAME["llama"], tmp_path / "Tiny-Llama-Chat")
    return tmp_path / "Tiny-Llama-Chat"


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "mistral"])
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = make_folder(BY_NAME[name], tmp_path / "m")
    write_base_gguf(tmp_path / "m", tmp_path / "b.gguf")
    with exact_llama(tmp_path / "b.gguf") as llama:
        tokens = llama.tokenize(PROMPTS[0])
        ours = llama.greedy(tokens, 24)
    theirs = model.generate(torch.tensor([tokens]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[
        0, len(tokens) :
    ].tolist()
    assert ours[-24:] == theirs


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_checkpoint_type_is_kept(dtype: str, tmp_path: Path) -> None:
    make_folder(BY_NAME["llama-biases"], tmp_path / "m", getattr(torch, dtype))
    report = write_base_gguf(tmp_path / "m", tmp_path / "b.gguf")
    expected = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert report.base_type == expected.lower()
    assert fields(tmp_path / "b.gguf")["general.file_type"] == {"F32": 0, "F16": 1, "BF16": 32}[expected]
    weights = load_file(tmp_path / "m" / "model.safetensors")
    for tensor in gguf.GGUFReader(tmp_path / "b.gguf").tensors:
        assert tensor.tensor_type.name == ("F32" if len(tensor.shape) == 1 else expected), tensor.name
    stored = next(t for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors if t.name == "blk.1.ffn_down.weight")
    original = weights["model.layers.1.mlp.down_proj.weight"]
    assert stored.data.tobytes() == original.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("base_type", ["f32", "f16", "bf16"])
def test_base_type_can_be_chosen(base_type: str, llama_folder: Path, tmp_path: Path) -> None:
    report = write_base_gguf(llama_folder, tmp_path / "b.gguf", base_type=base_type)
    assert report.base_type == base_type
    assert report == describe_folder(llama_folder, base_type=base_type)
    matrices = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors if len(t.shape) > 1}
    assert matrices == {base_type.upper()}


def test_float16_overflow_is_an_error(llama_folder: Path, tmp_path: Path) -> None:
    path = llama_folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(FormatError, match=r"blk\.0\.ffn_up\.weight.*100000.*--base-type bf16"):
        write_base_gguf(llama_folder, tmp_path / "b.gguf", base_type="f16")


def test_unknown_base_type(llama_folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="f32, f16, bf16"):
        describe_folder(llama_folder, base_type="q4_k")


def test_same_folder_gives_the_same_bytes(llama_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_base_gguf(llama_folder, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_progress_and_report(llama_folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    report = write_base_gguf(llama_folder, tmp_path / "b.gguf", progress=lambda *call: calls.append(call))
    model = GgufModel(tmp_path / "b.gguf")
    assert isinstance(report, BaseReport)
    assert [name for name, _, _ in calls] == list(model.tensors)
    assert calls[-1][1] == calls[-1][2] == report.nbytes == sum(t.n_bytes for t in model.tensors.values())
    assert (report.tensors, report.parameters) == (len(model.tensors), model.n_weights)
    assert (report.architecture, report.tokenizer_model, report.tokenizer_pre) == ("llama", "gpt2", "smollm")


def test_shards_give_the_same_file(llama_folder: Path, tmp_path: Path) -> None:
    write_base_gguf(llama_folder, tmp_path / "one.gguf")
    weights = load_file(llama_folder / "model.safetensors")
    (llama_folder / "model.safetensors").unlink()
    halves = [dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])]
    index: dict[str, str] = {}
    for number, half in enumerate(halves, 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(half, llama_folder / name, {"format": "pt"})
        index |= dict.fromkeys(half, name)
    (llama_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    write_base_gguf(llama_folder, tmp_path / "two.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


@pytest.mark.parametrize("name", ["gpt2", "starcoder", "llama-tied-mha"])
def test_names_without_the_base_prefix(name: str, tmp_path: Path) -> None:
    """GPT-2's own checkpoint has `h.0.ln_1.weight` for `transformer.h.0.ln_1.weight`, and causal masks among the weights."""
    make_folder(BY_NAME[name], tmp_path / "m")
    write_base_gguf(tmp_path / "m", tmp_path / "full.gguf")
    path = tmp_path / "m" / "model.safetensors"
    weights = {k.removeprefix("transformer.").removeprefix("model."): v for k, v in load_file(path).items()}
    if name == "gpt2":
        weights["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(weights, path, {"format": "pt"})
    write_base_gguf(tmp_path / "m", tmp_path / "bare.gguf")
    assert (tmp_path / "full.gguf").read_bytes() == (tmp_path / "bare.gguf").read_bytes()


def test_tied_output_matrix_is_left_out(tmp_path: Path) -> None:
    make_folder(BY_NAME["llama-tied-mha"], tmp_path / "m")
    write_base_gguf(tmp_path / "m", tmp_path / "a.gguf")
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()  # some savers write the copy
    save_file(weights, path, {"format": "pt"})
    write_base_gguf(tmp_path / "m", tmp_path / "b.gguf")
    assert "output.weight" not in GgufModel(tmp_path / "b.gguf").tensors
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_gemma3_inside_a_multimodal_checkpoint(tmp_path: Path) -> None:
    make_folder(BY_NAME["gemma3"], tmp_path / "m")
    write_base_gguf(tmp_path / "m", tmp_path / "a.gguf", name="same")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config, "model_type": "gemma3"}
    path = tmp_path / "m" / "model.safetensors"
    for prefix in ("language_model.", "model.language_model."):
        inner = {k: v for k, v in load_file(path).items() if "vision" not in k}
        renamed = {}
        for key, value in inner.items():
            bare = key.removeprefix("language_model.").removeprefix("model.language_model.").removeprefix("model.")
            renamed[f"language_model.model.{bare}" if prefix == "language_model." else prefix + bare] = value
        renamed["vision_tower.patch.weight"] = torch.zeros(4, 4)
        save_file(renamed, path, {"format": "pt"})
        (tmp_path / "m" / "config.json").write_text(json.dumps(outer))
        report = write_base_gguf(tmp_path / "m", tmp_path / "b.gguf", name="same")
        assert any("image encoder" in warning for warning in report.warnings)
        assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


CARD = """---
license: apache-2.0
language: [en, fr]
tags:
- text-generation
- /home/someone/private
base_model: /home/someone/models/secret-7B
model_creator: Some Lab
---
# A model
"""


def test_general_metadata(llama_folder: Path, tmp_path: Path) -> None:
    (llama_folder / "README.md").write_text(CARD)
    (llama_folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": "x"}))
    config = json.loads((llama_folder / "config.json").read_text())
    (llama_folder / "config.json").write_text(json.dumps({**config, "_name_or_path": str(llama_folder)}))
    write_base_gguf(llama_folder, tmp_path / "b.gguf")
    found = fields(tmp_path / "b.gguf")
    assert found["general.name"] == "Tiny Llama Chat"
    assert (found["general.basename"], found["general.finetune"]) == ("Tiny-Llama", "Chat")
    assert found["general.license"] == "apache-2.0"
    assert found["general.author"] == "Some Lab"
    assert found["general.languages"] == ["en", "fr"]
    assert found["general.tags"] == ["text-generation"]
    assert found["general.type"] == "model"
    assert found["general.quantization_version"] == 2
    assert found["general.sampling.temp"] == pytest.approx(0.6)
    assert found["general.sampling.top_k"] == 20
    assert "general.sampling.top_p" not in found
    raw = (tmp_path / "b.gguf").read_bytes()
    for secret in (b"someone", str(tmp_path).encode(), b"/home"):
        assert secret not in raw


def test_name_given_by_the_caller(llama_folder: Path, tmp_path: Path) -> None:
    write_base_gguf(llama_folder, tmp_path / "b.gguf", name="SomeOrg/Other-7B-Instruct")
    found = fields(tmp_path / "b.gguf")
    assert found["general.name"] == "Other 7B Instruct"
    assert found["general.organization"] == "SomeOrg"


@pytest.mark.parametrize(
    "card", ["", "---\n: : :\n---\n", "---\n- a\n- b\n---\n", "---\nlicense: {a: b}\ntags: 5\nname: [1]\n---\n"]
)
def test_odd_model_cards_are_survived(card: str, llama_folder: Path, tmp_path: Path) -> None:
    (llama_folder / "README.md").write_text(card)
    write_base_gguf(llama_folder, tmp_path / "b.gguf")
    assert fields(tmp_path / "b.gguf")["general.name"] == "Tiny Llama Chat"


def test_model_card_that_is_not_text(llama_folder: Path, tmp_path: Path) -> None:
    (llama_folder / "README.md").write_bytes(b"---\n\xff\xfe\n---\n")
    write_base_gguf(llama_folder, tmp_path / "b.gguf")


def test_special_tokens_and_templates(tmp_path: Path) -> None:
    make_folder(BY_NAME["llama"], tmp_path / "m", pad_token="<|im_end|>", unk_token={"content": "<|begin|>"})
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    (tmp_path / "m" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    write_base_gguf(tmp_path / "m", tmp_path / "b.gguf")
    found = fields(tmp_path / "b.gguf")
    ids = {key.removeprefix("tokenizer.ggml."): value for key, value in found.items() if key.endswith("_token_id")}
    assert ids == {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "unknown_token_id": 0,
        "padding_token_id": 1,
        "eot_token_id": 7,  # generation also stops there, and llama.cpp would not know
    }
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert found["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert found["tokenizer.chat_templates"] == ["tool_use"]


@pytest.mark.parametrize(
    "template", ["one", [{"name": "default", "template": "one"}, {"name": "rag", "template": "two"}, {"name": 5}, "x"]]
)
def test_templates_in_the_settings(template: Any, tmp_path: Path) -> None:
    make_folder(BY_NAME["llama"], tmp_path / "m", chat_template=template)
    write_base_gguf(tmp_path / "m", tmp_path / "b.gguf")
    found = fields(tmp_path / "b.gguf")
    assert found["tokenizer.chat_template"] == "one"
    assert ("tokenizer.chat_template.rag" in found) == isinstance(template, list)


# The real model
# ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package_gguf() -> Path:
    from qguard_edge.lab.hf_models import smollm2_file

    return smollm2_file()


@pytest.fixture(scope="module")
def smollm2(package_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """SmolLM2 through a float32 Hugging Face folder and back into a GGUF; with the transformers model it came from."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("real") / "SmolLM2-135M-Instruct"
    loaded = AutoModelForCausalLM.from_pretrained(package_gguf.parent, gguf_file=package_gguf.name, dtype=torch.float32)
    # transformers does not save a model that it read from a quantized file, so its weights go into a fresh one.
    fresh = type(loaded)(loaded.config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package_gguf.parent, gguf_file=package_gguf.name).save_pretrained(folder)
    # It also rebuilds the tokenizer without its pre-tokenizer's first step: SmolLM2 cuts numbers into digits. The
    # model's own tokenizer.json has the step, and so must a folder that stands for it.
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["pre_tokenizer"] = json.loads(TOKENIZER.to_str())["pre_tokenizer"]
    path.write_text(json.dumps(raw))
    base = folder.parent / "base.gguf"
    report = write_base_gguf(folder, base)
    assert (report.tokenizer_pre, report.tensors) == ("smollm", 272)
    assert [warning for warning in report.warnings if "read from a GGUF" not in warning] == []
    shutil.rmtree(folder)
    return base, fresh.eval()


@pytest.mark.training
def test_smollm2_tensors_equal_the_package(smollm2: tuple[Path, Any], package_gguf: Path) -> None:
    """Bit for bit, the rows of q and k included: the same network, so the same logits from the same arithmetic."""
    ours = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2[0]).tensors}
    theirs = gguf.GGUFReader(package_gguf).tensors
    assert {tensor.name for tensor in theirs} == set(ours)
    for tensor in theirs:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours[tensor.name].data, expected), tensor.name


@pytest.mark.training
def test_smollm2_ids_and_logits_equal_the_package_dequantized(
    smollm2: tuple[Path, Any], package_gguf: Path, tmp_path: Path
) -> None:
    from tests.helpers.hf_tokenizers import texts

    dequantized = tmp_path / "package-f32.gguf"
    reader = gguf.GGUFReader(package_gguf)
    writer = gguf.GGUFWriter(path=None, arch="llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(
                field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file(path=dequantized)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    chosen = texts()
    results = []
    for path in (smollm2[0], dequantized):
        with exact_llama(path, n_ctx=256) as llama:
            ids = [llama.tokenize(text, add_special=True) for text in chosen]
            results.append((ids, [llama.logits(llama.tokenize(prompt)) for prompt in PROMPTS[:2]]))
    assert results[0][0] == results[1][0]
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.training
def test_smollm2_metadata_equals_the_package(smollm2: tuple[Path, Any], package_gguf: Path) -> None:
    ours, theirs = fields(smollm2[0]), fields(package_gguf)
    # What is ours alone: widths that llama.cpp would derive, and facts that its converter leaves to defaults.
    assert set(ours) - set(theirs) == {
        "llama.attention.key_length",
        "llama.attention.value_length",
        "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.eot_token_id",
    }
    # What the folder does not say any more: the model card's fields, and a flag that byte-level BPE ignores.
    assert set(theirs) - set(ours) == {
        "general.organization",
        "general.license",
        "general.languages",
        "tokenizer.ggml.add_space_prefix",
    }
    different = {key for key in set(ours) & set(theirs) if ours[key] != theirs[key]}
    assert different == {"general.name", "general.basename", "general.finetune", "general.file_type"}


@pytest.mark.training
def test_smollm2_logits_equal_transformers(smollm2: tuple[Path, Any]) -> None:
    base, model = smollm2
    with exact_llama(base, n_ctx=256) as llama:
        tokens = llama.tokenize("<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n")
        ours, theirs = llama.logits(tokens), reference_logits(model, tokens)
    assert relative_error(ours, theirs) < 1e-4
    assert np.array_equal(ours.argmax(axis=1), theirs.argmax(axis=1))
