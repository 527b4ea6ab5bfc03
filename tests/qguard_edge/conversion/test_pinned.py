"""A base that changes while it is converted: the exit code was 0, and the output belonged to neither version."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.ftypes import parse_file_type
from convert.pinned import ChangedError, Pinned
from convert.quantizer import QuantizeOptions
from qguard_edge.conversion.request import GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import NoneOptions
from qguard_edge.progress import NoProgress


def write(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")


def replace(path: Path) -> None:
    shutil.copy(path, path.with_name("other"))
    path.with_name("other").replace(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


class Meanwhile(NoProgress):
    """Something happens to the base as soon as llama.cpp has quantized it."""

    def __init__(self, happens: Callable[[Path], None], base: Path) -> None:
        self.happens, self.base = happens, base

    def stage(self, name: str, total: int, unit: str) -> None:
        """See `Progress.stage`."""
        if name.startswith("Checking every bit"):
            self.happens(self.base)


@pytest.mark.parametrize("happens", [write, replace, Path.unlink])
def test_a_base_that_changes_is_an_error_and_leaves_nothing(
    happens: Callable[[Path], None], tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    base = Path(shutil.copy(tiny_base, tmp_path / "base.gguf"))
    os.utime(base, ns=(10**18, 10**18))
    request = GgufRequest(
        model=str(base),
        options=QuantizeOptions(parse_file_type("q4_0"), threads=1),
        defense=NoneOptions(),
        outfile=tmp_path / "out" / "o.gguf",
        check_loads=False,
    )
    with pytest.raises(ChangedError, match=r"base\.gguf changed while it was being read"):
        convert_model(request, Meanwhile(happens, base))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("happens", [write, replace, cut])
def test_every_shard_and_file_is_pinned(happens: Callable[[Path], None], tmp_path: Path) -> None:
    shards = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (*shards, folder / "model.safetensors"):
        path.write_bytes(b"12345")
        os.utime(path, ns=(10**18, 10**18))
    pinned = Pinned([shards[0], folder, None, "owner/name"])
    pinned.check()
    happens(shards[1])
    with pytest.raises(ChangedError, match="m-00002"):
        pinned.check()
    pinned = Pinned([folder])
    happens(folder / "model.safetensors")
    with pytest.raises(ChangedError, match="safetensors"):
        pinned.check()
