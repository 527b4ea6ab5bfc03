"""llama.cpp's own converter as a child process; here a stand-in script with the same command line."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.gguf_file import GgufModel
from convert.hf.external import ROOT_VARIABLE, ConverterError, ConverterLimits, find_converter, run_converter
from convert.hf.installed import SCRIPT
from quant_grids.errors import FormatError, UnsupportedError
from tests.helpers.hf_models import CASES, make_model, save_model

SCRIPT_TEXT = """
import argparse, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--outfile")
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"])
options = parser.parse_args()
print("INFO: converting", options.outtype)
{body}
"""
WRITES = """
import gguf, numpy
writer = gguf.GGUFWriter(options.outfile, "llama")
writer.add_string("general.description", options.outtype)
writer.add_tensor("token_embd.weight", numpy.zeros((2, 32), numpy.float32))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    monkeypatch.setenv("QGUARD_CACHE", str(tmp_path / "cache"))


def model_in(folder: Path) -> Path:
    """A folder whose weights cannot be read, which only the converter would notice."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "model.safetensors").write_bytes(b"")
    return model


def written_type(path: Path) -> str:
    return str(GgufModel(path).first.get("general.description"))


def script(folder: Path, body: str = WRITES) -> Path:
    path = folder / SCRIPT
    path.write_text(SCRIPT_TEXT.format(body=body))
    return path


def test_found_by_option_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_converter() is None
    path = script(tmp_path)
    assert find_converter(path) == path
    assert find_converter(tmp_path) == path
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    assert find_converter() == path
    other = tmp_path / "other"
    other.mkdir()
    assert find_converter(script(other)) == other / SCRIPT  # the option wins


def test_named_but_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="--converter names"):
        find_converter(tmp_path)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(UnsupportedError, match="LLAMA_CPP_ROOT names"):
        find_converter()


@pytest.mark.parametrize(("base_type", "outtype"), [(None, "f32"), ("bf16", "bf16"), ("f16", "f16")])
def test_runs_with_the_right_type(base_type: str | None, outtype: str, tmp_path: Path) -> None:
    # The checkpoint is float32, which the converter's own guess would turn into float16.
    llama = CASES[0]
    save_model(llama, make_model(llama), tmp_path / "m")
    lines: list[str] = []
    run_converter(script(tmp_path), tmp_path / "m", tmp_path / "b.gguf", base_type=base_type, on_line=lines.append)
    assert written_type(tmp_path / "b.gguf") == outtype
    assert lines == [f"INFO: converting {outtype}"]


def test_type_is_left_to_the_converter_when_the_weights_cannot_be_read(tmp_path: Path) -> None:
    run_converter(script(tmp_path), model_in(tmp_path), tmp_path / "b.gguf")
    assert written_type(tmp_path / "b.gguf") == "auto"


def test_failure_quotes_the_last_lines(tmp_path: Path) -> None:
    path = script(tmp_path, 'sys.exit("Model FooForCausalLM is not supported")')
    with pytest.raises(ConverterError, match=r"failed with exit status 1: .*FooForCausalLM is not supported"):
        run_converter(path, model_in(tmp_path), tmp_path / "b.gguf")


def test_success_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConverterError, match="did not write"):
        run_converter(script(tmp_path, ""), model_in(tmp_path), tmp_path / "b.gguf")


def test_output_that_is_not_a_gguf(tmp_path: Path) -> None:
    path = script(tmp_path, 'pathlib.Path(options.outfile).write_bytes(b"PK")')
    with pytest.raises(FormatError, match="not a GGUF"):
        run_converter(path, model_in(tmp_path), tmp_path / "b.gguf")


def test_unknown_base_type(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="f32, f16, bf16"):
        run_converter(script(tmp_path), model_in(tmp_path), tmp_path / "b.gguf", base_type="q8_0")


def test_child_does_not_outlive_an_interrupt(tmp_path: Path) -> None:
    path = script(tmp_path, "import time\nsys.stdout.flush()\ntime.sleep(60)")

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # returns at once: the child is killed, not waited for
        run_converter(path, model_in(tmp_path), tmp_path / "b.gguf", on_line=stop)


def brings_python(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "modeling_x.py").write_text("")


def names_code(folder: Path) -> None:
    (folder / "config.json").write_text('{"text_config": {"auto_map": {"AutoConfig": "other/repo--x.Config"}}}')


def tokenizer_names_code(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Tokenizer", null]}}')


@pytest.mark.parametrize("spoil", [brings_python, names_code, tokenizer_names_code])
def test_folders_with_code_are_refused_before_it_starts(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    folder = model_in(tmp_path)
    spoil(folder)
    path = script(tmp_path, f"pathlib.Path({str(tmp_path / 'started')!r}).touch()\n" + WRITES)
    with pytest.raises(UnsupportedError, match=r"Python code.*--trust-remote-code"):
        run_converter(path, folder, tmp_path / "b.gguf")
    assert not (tmp_path / "started").exists()
    run_converter(path, folder, tmp_path / "b.gguf", trust_remote_code=True)
    assert (tmp_path / "started").exists()


def test_weights_that_may_hold_code_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"no \.safetensors files"):
        run_converter(script(tmp_path), folder, tmp_path / "b.gguf", trust_remote_code=True)


def test_no_network_no_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    body = """
import os, socket
assert "HF_TOKEN" not in os.environ and os.environ["HF_HUB_OFFLINE"] == "1"
for reach in (lambda: socket.create_connection(("127.0.0.1", PORT), 5), lambda: socket.getaddrinfo("localhost", PORT)):
    try:
        reach()
    except PermissionError as error:
        print(error)
"""
    lines: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = body.replace("PORT", str(server.getsockname()[1])) + WRITES
        run_converter(script(tmp_path, text), model_in(tmp_path), tmp_path / "b.gguf", on_line=lines.append)
    assert sum("without a network" in line for line in lines) == 2


def test_time_and_memory_are_limited(tmp_path: Path) -> None:
    path = script(tmp_path, "import time\ntime.sleep(60)")
    with pytest.raises(ConverterError, match="did not finish within 1 s"):
        run_converter(path, model_in(tmp_path), tmp_path / "b.gguf", limits=ConverterLimits(1, 4 << 30))
    path = script(tmp_path, "data = bytearray(6 << 30)")
    with pytest.raises(ConverterError, match="MemoryError"):
        run_converter(path, model_in(tmp_path), tmp_path / "b.gguf", limits=ConverterLimits(60, 4 << 30))
