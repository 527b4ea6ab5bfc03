"""Metadata that costs far more than it weighs is refused before it is parsed; values of the wrong kind are one sentence."""

import json
import os
import shutil
import struct
import time
from contextlib import suppress
from pathlib import Path

import pytest

from convert.atomic import OutputError, atomic_path, work_folder
from convert.gguf_file import MAX_FIELDS, MAX_ITEMS, MAX_KEY, GgufFile, encode_key_value
from convert.hf.base import write_base_gguf
from quant_grids.errors import FormatError, QGuardError

U8, STRING, ARRAY = 0, 8, 9


def gguf_of(path: Path, fields: list[bytes], count: int | None = None, tensors: int = 0) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(fields) if count is None else count)
    path.write_bytes(head + b"".join(fields) + bytes(64))
    return path


def entry(key: bytes, value_type: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", value_type) + value


def test_millions_of_tiny_entries_are_refused_at_once(tmp_path: Path) -> None:
    """64 MiB of them took 18 s and 1.2 GB."""
    tiny = b"".join(entry(f"{i:07d}".encode(), U8, b"\0") for i in range(50_000)) * 64
    started = time.perf_counter()
    with pytest.raises(FormatError, match=f"metadata entries; at most {MAX_FIELDS} are read"):
        GgufFile(gguf_of(tmp_path / "x.gguf", [tiny], 3_200_000))
    assert time.perf_counter() - started < 1
    with pytest.raises(FormatError, match="tensors; at most"):
        GgufFile(gguf_of(tmp_path / "x.gguf", [], tensors=2_000_000))


@pytest.mark.parametrize("size", [MAX_KEY + 1, 20 << 20])
def test_a_huge_key_is_not_repeated_in_the_message(size: int, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"key of {size} bytes") as caught:
        GgufFile(gguf_of(tmp_path / "x.gguf", [entry(b"k" * size, U8, b"\0")]))
    assert len(str(caught.value)) < 200


def test_an_array_that_is_small_on_disk_and_huge_in_memory(tmp_path: Path) -> None:
    count = MAX_ITEMS + 1
    file = GgufFile(gguf_of(tmp_path / "x.gguf", [entry(b"a", ARRAY, struct.pack("<IQ", U8, count) + bytes(count))]))
    with pytest.raises(FormatError, match="more than"):
        file.value("a")


@pytest.mark.parametrize("value", ["4096", float("nan"), -1, 0, True])
def test_a_count_that_is_none(value: str | float | bool, tmp_path: Path) -> None:
    """`context_length` as a string or NaN was an internal error of `verify` and `check`."""
    file = GgufFile(gguf_of(tmp_path / "x.gguf", [encode_key_value("llama.context_length", value)]))
    with pytest.raises(FormatError, match=r"x\.gguf: llama\.context_length is .* must be a positive integer"):
        file.count("llama.context_length", 7)
    assert file.count("none", 7) == 7


@pytest.mark.parametrize("value", [2**70, -(2**70), 1e300, "\ud800"])
def test_metadata_that_no_gguf_can_hold(value: int | float | str) -> None:
    """A plan with an integer of 2^70 was an internal error of `apply`."""
    with pytest.raises(FormatError, match="cannot be written to a GGUF"):
        encode_key_value("qguard.x", value)


def test_an_added_token_of_megabytes_is_refused_early(tiny_folder: Path, tmp_path: Path) -> None:
    """64 MB of it took 5.2 GB."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"][0]["content"] = "x" * (1 << 20)
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(FormatError, match="a token of 1048576 characters") as caught:
        write_base_gguf(folder, tmp_path / "x.gguf")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [5, [5], {"content": 5}, {"content": "\ud800"}])
def test_a_token_role_of_the_wrong_kind(value: object, tiny_folder: Path, tmp_path: Path) -> None:
    """`bos_token` 5 was an internal error where transformers loads the model."""
    from qguard_edge.runtimes.hf import load_hf_model, load_tokenizer

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": value}))
    for load in (load_hf_model, load_tokenizer):
        with suppress(QGuardError):  # newer versions of transformers may take it
            load(folder)


def test_a_full_disk_names_the_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"out cannot be written: No space left on device"), atomic_path(tmp_path / "out"):
        raise OSError(28, os.strerror(28))
    with pytest.raises(OutputError, match=r"out cannot be written"), work_folder(tmp_path / "out"):
        raise OSError(28, os.strerror(28))
    assert list(tmp_path.iterdir()) == []
