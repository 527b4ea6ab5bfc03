"""llama.cpp's own converter as a child process; here a stand-in script with the same command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.hf.external import ROOT_VARIABLE, SCRIPT, ConverterError, find_converter, run_converter
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
WRITES = 'pathlib.Path(options.outfile).write_bytes(b"GGUF" + options.outtype.encode())'


@pytest.fixture(autouse=True)
def no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)


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
    assert (tmp_path / "b.gguf").read_bytes() == b"GGUF" + outtype.encode()
    assert lines == [f"INFO: converting {outtype}"]


def test_type_is_left_to_the_converter_when_the_weights_cannot_be_read(tmp_path: Path) -> None:
    run_converter(script(tmp_path), tmp_path, tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == b"GGUFauto"


def test_failure_quotes_the_last_lines(tmp_path: Path) -> None:
    path = script(tmp_path, 'sys.exit("Model FooForCausalLM is not supported")')
    with pytest.raises(ConverterError, match=r"failed with exit status 1: .*FooForCausalLM is not supported"):
        run_converter(path, tmp_path, tmp_path / "b.gguf")


def test_success_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConverterError, match="did not write"):
        run_converter(script(tmp_path, ""), tmp_path, tmp_path / "b.gguf")


def test_output_that_is_not_a_gguf(tmp_path: Path) -> None:
    path = script(tmp_path, 'pathlib.Path(options.outfile).write_bytes(b"PK")')
    with pytest.raises(FormatError, match="not a GGUF"):
        run_converter(path, tmp_path, tmp_path / "b.gguf")


def test_unknown_base_type(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="f32, f16, bf16"):
        run_converter(script(tmp_path), tmp_path, tmp_path / "b.gguf", base_type="q8_0")


def test_child_does_not_outlive_an_interrupt(tmp_path: Path) -> None:
    path = script(tmp_path, "import time\nsys.stdout.flush()\ntime.sleep(60)")

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # returns at once: the child is killed, not waited for
        run_converter(path, tmp_path, tmp_path / "b.gguf", on_line=stop)
