"""Folders that are incomplete, contradictory or hostile: one clear error each, before anything is written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.hf.base import describe_folder, write_base_gguf
from convert.hf.families import Family, built_in
from quant_grids.errors import FormatError, QGuardError, UnsupportedError
from tests.helpers.hf_models import CASES, make_model, save_model
from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

BY_NAME = {case.name: case for case in CASES}
TOKENIZER = train_byte_bpe(digits_then_bytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(BY_NAME["llama"], make_model(BY_NAME["llama"]), tmp_path / "m")
    save_tokenizer(TOKENIZER, tmp_path / "m")
    return tmp_path / "m"


def refused(folder: Path, match: str, kind: type[QGuardError] = FormatError) -> None:
    """Both entry points refuse the folder, and the writing one leaves no file."""
    outfile = folder.parent / "out.gguf"
    calls: list[Callable[[], object]] = [lambda: describe_folder(folder), lambda: write_base_gguf(folder, outfile)]
    for call in calls:
        with pytest.raises(kind, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
    assert not outfile.exists()


def edit_config(folder: Path, change: dict[str, Any] | Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config) if callable(change) else config.update(change)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def test_no_such_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "is not a folder")


def test_a_file_is_not_a_folder(folder: Path) -> None:
    refused(folder / "config.json", "is not a folder")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, r"Cannot read .*config\.json")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"architectures": "LlamaForCausalLM"}', "names no architectures"),
        ('{"architectures": []}', "names no architectures"),
        ('{"architectures": [5]}', "names no architectures"),
        ("\xff", "not valid JSON"),
    ],
)
def test_broken_config(text: str, match: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, match)


def test_enormous_config_is_not_read(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no room
    refused(folder, "more than the 16777216")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_pipes_are_not_read(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, "is not a regular file")


def test_unsupported_architecture_names_both_ways_out(folder: Path) -> None:
    edit_config(folder, {"architectures": ["MambaForCausalLM"]})
    refused(folder, r"MambaForCausalLM is not built in.*--converter PATH.*LLAMA_CPP_ROOT.*F16/BF16 GGUF", UnsupportedError)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": "256"}, "hidden_size must be an integer"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"hidden_size": -1}, "outside 1"),
        ({"hidden_size": 10**12}, "outside 1"),
        ({"num_hidden_layers": 100_000}, r"outside 1\.\.512"),
        ({"num_hidden_layers": 3}, r"no tensor model\.layers\.2\."),
        ({"num_attention_heads": 3}, "not a multiple of"),
        ({"head_dim": 33}, "is odd"),
        ({"vocab_size": 512}, r"shape \[384, 256\].*calls for \[512, 256\]"),
        ({"intermediate_size": 1024}, r"calls for \[1024, 256\]"),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
        ({"rms_norm_eps": "tiny"}, "finite number"),
        ({"rope_parameters": 5}, "must be an object"),
        ({"rope_parameters": {"rope_type": "linear"}}, "has no factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "must be positive"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -5}}, "must be positive"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}}, "0 < low"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "list of 32 numbers"),
        ({"quantization_config": 7}, "must be an object"),
    ],
)
def test_configuration_that_does_not_fit(change: dict[str, Any], match: str, folder: Path) -> None:
    edit_config(folder, change)
    refused(folder, match)


def test_nan_in_the_configuration(folder: Path) -> None:
    text = (folder / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN')
    (folder / "config.json").write_text(text)
    refused(folder, "finite number")


@pytest.mark.parametrize(
    ("case", "change", "match"),
    [
        ("llama", {"num_hidden_layers": 1}, r"9 tensors that its configuration does not call for, such as model\.layers\.1"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic'"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "qwen2 graph has no llama3"),
        ("qwen3", {"attention_bias": True}, "attention_bias to True"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob to False"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar to 100"),
        ("gemma2", {"layer_types": ["full_attention", "full_attention"]}, "always has windowed layers"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "both directions"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("starcoder2", {"use_bias": False}, "use_bias"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1]}, "every fourth layer"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}, "every fourth layer"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"activation_function": "gelu"}, "activation 'gelu'"),
    ],
)
def test_what_the_graph_would_compute_differently(case: str, change: dict[str, Any], match: str, tmp_path: Path) -> None:
    save_model(BY_NAME[case], make_model(BY_NAME[case]), tmp_path / "m")
    save_tokenizer(TOKENIZER, tmp_path / "m")
    describe_folder(tmp_path / "m")
    edit_config(tmp_path / "m", change)
    refused(tmp_path / "m", match, UnsupportedError)


def test_layer_types_that_make_no_sense(tmp_path: Path) -> None:
    save_model(BY_NAME["gemma2"], make_model(BY_NAME["gemma2"]), tmp_path / "m")
    edit_config(tmp_path / "m", {"layer_types": ["sliding_attention"]})
    refused(tmp_path / "m", "layer_types must name 2 layers")


def test_missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, r"no tensor model\.layers\.1\.mlp\.up_proj\.weight")


def test_left_over_tensor(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"model.layers.0.adapter.weight": torch.zeros(2, 2)}))
    refused(
        folder, r"1 tensors that its configuration does not call for, such as model\.layers\.0\.adapter", UnsupportedError
    )


def test_wrong_dtype(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(256, dtype=torch.int8)}))
    refused(folder, r"model\.norm\.weight is stored as I8", UnsupportedError)


def test_only_pickle_files(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pickle weights.*can run code", UnsupportedError)


def test_pickles_beside_safetensors_are_never_opened(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    describe_folder(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, r"has no model\.safetensors")


def test_several_files_without_an_index(folder: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    refused(folder, r"2 safetensors files but no model\.safetensors\.index\.json")


def header(values: dict[str, Any]) -> bytes:
    raw = json.dumps(values).encode()
    return struct.pack("<Q", len(raw)) + raw


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 1 << 62),
        struct.pack("<Q", 10) + b"{",
        header({"model.norm.weight": {"dtype": "F32", "shape": [256], "data_offsets": [0, 1024]}}),
        header({"model.norm.weight": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}) + b"\0" * 4,
        header({"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}) + b"\0" * 4,
        header({"model.norm.weight": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 4,
    ],
)
def test_broken_safetensors(raw: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(raw)
    refused(folder, r"model\.safetensors is not a readable safetensors file")


def test_truncated_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "not a readable safetensors file")


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", ".", 5, None]
)
def test_index_entries_stay_in_the_folder(name: Any, folder: Path) -> None:
    (folder.parent / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    write_index(folder, {"model.norm.weight": name})
    refused(folder, "not a (safetensors )?file")


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        (None, "has no weight_map"),
        ([], "has no weight_map"),
        ({}, "has no weight_map"),
        ({"x": "model.bin"}, "not a safetensors file"),
        ({"x": "missing.safetensors"}, r"missing\.safetensors is missing"),
        ({"no.such.tensor": "model.safetensors"}, r"says no\.such\.tensor is in model.safetensors, but it is not"),
    ],
)
def test_broken_index(weight_map: Any, match: str, folder: Path) -> None:
    write_index(folder, weight_map)
    refused(folder, match)


def test_tensor_in_two_shards(folder: Path) -> None:
    (folder / "second.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    write_index(folder, {"model.norm.weight": "model.safetensors", "lm_head.weight": "second.safetensors"})
    refused(folder, "is in both")


def test_output_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="Cannot write"):
        write_base_gguf(folder, tmp_path / "no" / "such" / "folder.gguf")


def test_remote_code_is_not_run(folder: Path) -> None:
    marker = folder.parent / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    edit_config(folder, {"auto_map": {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}})
    describe_folder(folder)
    assert not marker.exists()


def test_registering_an_architecture_twice_is_an_error() -> None:
    with pytest.raises(TypeError, match="LlamaForCausalLM is claimed by"):
        type("Second", (Family,), {"architectures": ("LlamaForCausalLM",)})


def test_built_in_families() -> None:
    names = [family.__name__ for family in built_in()]
    assert len(names) == len(set(names))
    assert {case.family for case in CASES} <= set(names)
    document = (Path(__file__).parents[3] / "docs" / "architectures.md").read_text()
    for family in built_in():
        assert family.title in document
        for architecture in family.architectures:
            assert f"`{architecture}`" in document
