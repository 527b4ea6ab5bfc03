"""The judge of `scripts/same_bytes.py`: every kind of difference is seen, and named for what it is."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from output_hashes import Difference, compare_parts, overall_hash, parts_of
from safetensors.numpy import save_file

SEED = {"qguard.seed": "7"}


def gguf_file(
    path: Path,
    *,
    texts: Mapping[str, str] = SEED,
    changed: str = "",
    order: tuple[str, ...] = ("a", "b"),
    shape: tuple[int, int] = (4, 8),
) -> Path:
    """A GGUF of two tensors, 0 to 31 in F32; one weight of `changed` is another."""
    writer = GGUFWriter(path, "llama")
    for key, value in {"general.name": "tiny", **texts}.items():
        writer.add_string(key, value)
    for name in order:
        values = np.arange(32, dtype=np.float32).reshape(shape)
        values[0, 0] += name == changed
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def difference(tmp_path: Path, **changes: object) -> Difference:
    old, new = gguf_file(tmp_path / "old.gguf"), gguf_file(tmp_path / "new.gguf", **changes)  # type: ignore[arg-type]
    return compare_parts(parts_of(old), parts_of(new))


def test_the_same_file(tmp_path: Path) -> None:
    assert difference(tmp_path) == Difference((), ())


def test_one_weight(tmp_path: Path) -> None:
    assert difference(tmp_path, changed="b") == Difference(("data section", "tensor b"), ())


def test_hash_is_of_the_data_section(tmp_path: Path) -> None:
    one = gguf_file(tmp_path / "one.gguf")
    other = gguf_file(tmp_path / "other.gguf", texts={"qguard.seed": "8", "qguard.more": "x" * 100})
    assert overall_hash(parts_of(one)) == overall_hash(parts_of(other))
    assert overall_hash(parts_of(one)) != overall_hash(parts_of(gguf_file(tmp_path / "third.gguf", changed="a")))


@pytest.mark.parametrize(
    "texts", [{"qguard.seed": "8"}, {"qguard.seed": "7", "qguard.base": "1"}, {}], ids=["changed", "added", "removed"]
)
def test_own_metadata_is_noted(tmp_path: Path, texts: Mapping[str, str]) -> None:
    found = difference(tmp_path, texts=texts)
    assert found.same
    assert len(found.noted) == 1


@pytest.mark.parametrize("texts", [{**SEED, "general.name": "big"}, {**SEED, "general.url": "x"}], ids=["changed", "added"])
def test_other_metadata_is_judged(tmp_path: Path, texts: Mapping[str, str]) -> None:
    found = difference(tmp_path, texts=texts)
    assert found.parts == (f"metadata {list(texts)[-1]}",)


def test_order_of_tensors(tmp_path: Path) -> None:
    """Their data is the same, so the data section is; only the places tell."""
    assert difference(tmp_path, order=("b", "a")).parts == ("tensor a", "tensor b")


def test_shape_of_a_tensor(tmp_path: Path) -> None:
    assert difference(tmp_path, shape=(8, 4)).parts == ("tensor a", "tensor b")


def test_order_of_metadata(tmp_path: Path) -> None:
    old = gguf_file(tmp_path / "old.gguf", texts={"general.url": "u", "general.author": "w"})
    new = gguf_file(tmp_path / "new.gguf", texts={"general.author": "w", "general.url": "u"})
    assert compare_parts(parts_of(old), parts_of(new)).parts == ("order of the parts",)


def folder(path: Path) -> Path:
    path.mkdir()
    save_file({"w": np.zeros(4, np.float32)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    (path / "README.md").write_text("card")
    (path / "qguard.json").write_text('{"version": "1"}')
    return path


def _weights(made: Path) -> None:
    save_file({"w": np.ones(4, np.float32)}, made / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda _made: None, Difference((), ())),
        (_weights, Difference(("file model.safetensors",), ())),
        (lambda made: (made / "config.json").write_text("{ }"), Difference(("file config.json",), ())),
        (lambda made: (made / "config.json").unlink(), Difference(("file config.json",), ())),
        (lambda made: (made / "more.txt").write_text(""), Difference(("file more.txt",), ())),
        (lambda made: (made / "README.md").write_text("other"), Difference((), ("README.md",))),
        (lambda made: (made / "qguard.json").write_text('{"version": "2"}'), Difference((), ("qguard.json version",))),
    ],
)
def test_folders(tmp_path: Path, change: Callable[[Path], object], expected: Difference) -> None:
    old, new = folder(tmp_path / "old"), folder(tmp_path / "new")
    change(new)
    assert compare_parts(parts_of(old), parts_of(new)) == expected


def test_plans(tmp_path: Path) -> None:
    def plan(name: str, value: int, version: str) -> Path:
        path = tmp_path / name
        save_file({"a.up": np.full(4, value, np.uint8)}, path, {"header": json.dumps({"version": version})})
        return path

    old = parts_of(plan("old.safetensors", 1, "1"))
    assert compare_parts(old, parts_of(plan("renamed.safetensors", 1, "2"))) == Difference((), ("header",))
    assert compare_parts(old, parts_of(plan("other.safetensors", 2, "1"))) == Difference(("data section",), ())


def test_no_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        parts_of(tmp_path / "out.gguf")
