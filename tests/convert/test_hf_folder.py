"""Folders appear whole or not at all; shards and the index hold together."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from convert.atomic import OutputError, check_folder_writable, commit_folder, work_folder
from convert.hf_folder import ShardWriter, copy_side_files


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """The steps that a conversion takes."""
    check_folder_writable(path, overwrite=overwrite, marker=marker)
    with work_folder(path) as work:
        (work / "made").mkdir()
        yield work / "made"
        commit_folder(work / "made", path)


def leftovers(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out", overwrite=False, marker="config.json") as work:
        (work / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "out", overwrite=False, marker="config.json") as work:
            (work / "a").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert leftovers(tmp_path) == []


def test_overwriting_keeps_the_old_one_until_the_end(tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / "config.json").write_text("old")
    with pytest.raises(OutputError, match="--overwrite"), atomic_folder(old, overwrite=False, marker="config.json"):
        pass
    with pytest.raises(RuntimeError), atomic_folder(old, overwrite=True, marker="config.json"):
        raise RuntimeError
    assert (old / "config.json").read_text() == "old"
    with atomic_folder(old, overwrite=True, marker="config.json") as work:
        (work / "config.json").write_text("new")
    assert (old / "config.json").read_text() == "new"
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_not_a_model_folder_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "config.json").write_text("{}")
    if kind == "folder":
        path.mkdir()
        (path / "thesis.txt").write_text("years of work")
    elif kind == "file":
        path.write_text("years of work")
    else:
        path.symlink_to(precious)
    with (
        pytest.raises(OutputError, match="will not be replaced"),
        atomic_folder(path, overwrite=True, marker="config.json"),
    ):
        pass
    assert path.exists()
    assert (precious / "config.json").read_text() == "{}"


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(7)}
    writer = ShardWriter(tmp_path, shard_bytes=900)
    for i in range(0, 6, 2):
        writer.add({f"t{i}": tensors[f"t{i}"], f"t{i + 1}": tensors[f"t{i + 1}"]})
    writer.add({"t6": tensors["t6"]})
    files = writer.finish()
    assert [file.name for file in files] == [f"model-0000{i + 1}-of-00004.safetensors" for i in range(4)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 400 == writer.total_bytes
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    assert index["weight_map"]["t0"] == index["weight_map"]["t1"]  # what is added together stays together
    assert len(leftovers(tmp_path)) == 5


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add({"a": torch.arange(4).t()})
    with pytest.raises(OutputError, match="twice"):
        writer.add({"a": torch.zeros(1)})
    assert [file.name for file in writer.finish()] == ["model.safetensors"]
    assert leftovers(tmp_path) == ["model.safetensors"]


def test_side_files_are_copied_and_code_is_not(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    for name in ("tokenizer.json", "modeling_evil.py", "pytorch_model.bin", "optimizer.pt", "generation_config.json"):
        (source / name).write_text(name)
    (source / "chat_template.jinja").symlink_to(source / "tokenizer.json")  # the hub's cache is made of links
    copied = copy_side_files(source, target)
    assert sorted(copied) == leftovers(target) == ["chat_template.jinja", "generation_config.json", "tokenizer.json"]
    assert not (target / "chat_template.jinja").is_symlink()


def test_where_a_model_was_made_is_not_told(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "tokenizer_config.json").write_text('{"name_or_path": "/home/somebody/secret-project", "eos_token": "</s>"}')
    copy_side_files(source, target)
    assert json.loads((target / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
