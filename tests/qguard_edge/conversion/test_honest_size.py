"""Names and sizes of models whose rows do not fit the type that was asked for."""

import json
import re
from pathlib import Path

import pytest
import transformers

from convert.gguf_file import GgufModel
from convert.hf.base import write_base_gguf
from tests.helpers.command import CommandLine
from tests.helpers.hf_models import randomise, standard
from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe

OPTIONS = ("--defense", "ortho", "--threads", "1", "--json", "--no-scan", "--no-load-check")


@pytest.fixture(scope="module")
def odd_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with rows of 320 weights: no multiple of 256."""
    folder = tmp_path_factory.mktemp("odd")
    options = standard(
        hidden_size=320, intermediate_size=640, num_attention_heads=5, num_key_value_heads=5, num_hidden_layers=1
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    randomise(model)
    model.save_pretrained(folder / "model")
    save_tokenizer(train_byte_bpe(digits_then_bytes()), folder / "model")
    write_base_gguf(folder / "model", folder / "odd.gguf", base_type="bf16")
    return folder / "odd.gguf"


def test_the_name_is_called_what_it_is(odd_base: Path, cli: CommandLine, tmp_path: Path) -> None:
    done = cli("convert", odd_base, "--to", "q4_k", *OPTIONS, "-o", tmp_path / "out.gguf")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    model = GgufModel(tmp_path / "out.gguf")
    fallen = {fallback["tensor"] for fallback in said["fallbacks"]}
    assert fallen
    weights = sum(model.tensors[name].n_weights for name in fallen) / model.n_weights
    bits = 8 * sum(tensor.n_bytes for tensor in model.tensors.values()) / model.n_weights
    warning = next(one for one in said["warnings"] if "fell back" in one)
    found = re.match(r"(\d+)% of the weights fell back .* called Q4_K_M and has ([\d.]+) bits per weight", warning)
    assert found is not None
    assert float(found[1]) == round(100 * weights)
    assert float(found[2]) == pytest.approx(bits, abs=0.01)
    assert bits > 5.0


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_no_fallback_refuses(more: tuple[str, ...], odd_base: Path, cli: CommandLine, tmp_path: Path) -> None:
    done = cli("convert", odd_base, "--to", "q4_k", *OPTIONS, "--no-fallback", *more, "-o", tmp_path / "out.gguf")
    assert done.returncode == 2
    assert re.search(r"--no-fallback: .* has rows of 320, so that Q4_K becomes Q5_0", " ".join(done.stderr.split()))
    assert list(tmp_path.iterdir()) == []


def test_no_fallback_lets_pass_what_fits(odd_base: Path, tiny_base: Path, cli: CommandLine, tmp_path: Path) -> None:
    for base, to, more in ((odd_base, "q4_0", ("--pure",)), (tiny_base, "q4_k", ())):
        done = cli("convert", base, "--to", to, *more, *OPTIONS, "--no-fallback", "-o", tmp_path / f"{to}.gguf")
        assert done.returncode == 0, done.stderr
        assert not [one for one in json.loads(done.stdout)["warnings"] if "fell back" in one]
