"""Shards: the bytes that llama.cpp's own library writes for the same cut, and what every command does with them."""

import ctypes
import itertools
import json
import os
from pathlib import Path

import pytest

from convert.gguf_file import GgufFile, GgufModel
from convert.hashes import sha256_of
from convert.split import SplitRule, in_one_piece, parse_split_size, shard_name, shares_of, write_shards
from qguard_edge import convert, request_for
from quant_grids.errors import UnsupportedError
from tests.helpers.command import CommandLine
from tests.helpers.ggml_oracle import library


class InitParams(ctypes.Structure):
    """`struct gguf_init_params`."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]


def shards_by_library(whole: Path, counts: list[int], folder: Path) -> list[bytes]:
    """What llama-gguf-split does, by the functions of libggml that it calls: metadata in its order, then the tensors' bytes."""
    lib = library()
    lib.gguf_init_from_file.restype = lib.gguf_init_empty.restype = lib.ggml_get_tensor.restype = ctypes.c_void_p
    lib.gguf_get_tensor_name.restype = ctypes.c_char_p
    lib.gguf_get_meta_size.restype = lib.gguf_get_data_offset.restype = lib.gguf_get_tensor_offset.restype = ctypes.c_size_t
    lib.ggml_nbytes.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    context = pointer()
    source = pointer(lib.gguf_init_from_file(os.fsencode(whole), InitParams(True, ctypes.pointer(context))))
    assert source
    raw, total, done, made = whole.read_bytes(), sum(counts), 0, []
    for i, count in enumerate(counts):
        out = pointer(lib.gguf_init_empty())
        if i == 0:
            lib.gguf_set_kv(out, source)
        lib.gguf_set_val_u16(out, b"split.no", ctypes.c_uint16(i))
        lib.gguf_set_val_u16(out, b"split.count", ctypes.c_uint16(0))
        lib.gguf_set_val_i32(out, b"split.tensors.count", ctypes.c_int32(total))
        data = b""
        for index in range(done, done + count):
            name = lib.gguf_get_tensor_name(source, number(index))
            tensor = pointer(lib.ggml_get_tensor(context, name))
            lib.gguf_add_tensor(out, tensor)
            start = lib.gguf_get_data_offset(source) + lib.gguf_get_tensor_offset(source, number(index))
            data += raw[start : start + lib.ggml_nbytes(tensor)]
            data += b"\0" * (-len(data) % 32)
        done += count
        lib.gguf_set_val_u16(out, b"split.count", ctypes.c_uint16(len(counts)))
        size = lib.gguf_get_meta_size(out)
        head = ctypes.create_string_buffer(size)
        lib.gguf_get_meta_data(out, head)
        made.append(head.raw + data)
        lib.gguf_free(out)
    lib.gguf_free(source)
    lib.ggml_free(context)
    return made


@pytest.fixture(scope="module")
def hardened(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole hardened file, and beside it the plain one."""
    outfile = tmp_path_factory.mktemp("whole") / "whole.gguf"
    convert(request_for(tiny_base, "q4_k", defense="ortho", seed=3, threads=1, keep_plain=True, outfile=outfile), scan=False)
    return outfile


OPTIONS = ("--to", "q4_k", "--defense", "ortho", "--seed", "3", "--threads", "1", "--quiet", "--no-scan")


def names_of(path: Path) -> list[list[str]]:
    return [list(shard.tensors) for shard in GgufModel(path).shards]


@pytest.mark.parametrize(
    ("rule", "most"), [(SplitRule(max_tensors=8), 8), (SplitRule(max_tensors=1), 1), (SplitRule(max_bytes=200_000), 0)]
)
def test_the_bytes_of_llama_gguf_split(rule: SplitRule, most: int, hardened: Path, tmp_path: Path) -> None:
    whole = GgufFile(hardened)
    shares = shares_of(whole, rule, GgufModel(hardened))
    if most:
        assert [len(share) for share in shares[:-1]] == [most] * (len(shares) - 1)
    else:
        for share, following in itertools.pairwise(shares):
            assert sum(tensor.n_bytes for tensor in share) <= 200_000 or len(share) == 1
            assert sum(tensor.n_bytes for tensor in [*share, following[0]]) > 200_000
    paths = write_shards(whole, shares, tmp_path, "cut.gguf")
    assert [path.name for path in paths] == [shard_name("cut.gguf", i, len(shares)) for i in range(len(shares))]
    expected = shards_by_library(hardened, [len(share) for share in shares], tmp_path)
    for path, content in zip(paths, expected, strict=True):
        assert path.read_bytes() == content, path.name
    assert in_one_piece(paths[0], tmp_path).path.read_bytes() == hardened.read_bytes()


def test_a_three_way_split_through_every_command(tiny_base: Path, hardened: Path, cli: CommandLine, tmp_path: Path) -> None:
    """convert -> diff -> inspect -> scan -> verify; the shards are those of the whole, whose own codes they have."""
    n_tensors = len(GgufFile(hardened).tensors)
    done = cli(
        "convert", tiny_base, *OPTIONS[:-2], "--json", "--no-scan", "--keep-plain",
        "--split-max-tensors", str(-(-n_tensors // 3)), "-o", tmp_path / "cut.gguf",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    first, plain = tmp_path / "cut-00001-of-00003.gguf", tmp_path / "cut.plain-00001-of-00003.gguf"
    assert said["outfile"] == first.name
    whole = GgufFile(hardened)
    expected = shards_by_library(hardened, [len(shard) for shard in names_of(first)], tmp_path)
    assert [shard.path.read_bytes() for shard in GgufModel(first).shards] == expected
    assert said["sha256"]["output"] == sha256_of(shard.path for shard in GgufModel(first).shards)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(shard_name("cut.gguf", i, 3) for i in range(3)), *(shard_name("cut.plain.gguf", i, 3) for i in range(3)),
    }  # fmt: skip
    for a, b in ((plain, first), (hardened.with_name("whole.plain.gguf"), first), (plain, hardened)):
        found = json.loads(cli("diff", a, b, "--base", tiny_base, "--json").stdout)
        assert found["only_code_bits"]
        assert found["codes_changed"] > 0
    assert json.loads(cli("diff", hardened, first, "--json").stdout)["codes_changed"] == 0
    looked = json.loads(cli("inspect", first, "--json").stdout)
    assert looked["weights"] == sum(tensor.n_weights for tensor in whole.tensors.values())
    assert looked["qguard"]["defense"] == "ortho"
    asked = cli(
        "verify", first, "--base", tiny_base, "--plain", plain, "--suites", "drift", "--limit", "2", "--threads", "1", "--json"
    )  # fmt: skip
    assert json.loads(asked.stdout)["verdict"] in ("pass", "inconclusive"), asked.stderr


def test_keep_split_follows_the_input(tiny_base: Path, cli: CommandLine, tmp_path: Path) -> None:
    """A split base gives the same codes as the whole one, cut where the base is; scan takes it as well."""
    base = GgufFile(tiny_base)
    cut = write_shards(base, shares_of(base, SplitRule(max_tensors=9), GgufModel(tiny_base)), tmp_path, "base.gguf")[0]
    done = cli("convert", cut, *OPTIONS, "--keep-split", "-o", tmp_path / "kept.gguf")
    assert done.returncode == 0, done.stderr
    kept = tmp_path / shard_name("kept.gguf", 0, len(GgufModel(cut).shards))
    assert [set(names) for names in names_of(kept)] == [set(names) for names in names_of(cut)]
    whole = tmp_path / "whole.gguf"
    assert cli("convert", cut, *OPTIONS, "-o", whole).returncode == 0
    assert json.loads(cli("diff", whole, kept, "--json").stdout)["codes_changed"] == 0
    assert json.loads(cli("scan", cut, "--to", "q4_0", "--json").stdout)["findings"] == []
    refused = cli("convert", tiny_base, *OPTIONS, "--keep-split", "-o", tmp_path / "no.gguf")
    assert refused.returncode == 2
    assert "in one piece" in refused.stderr


def test_apply_takes_a_split_plain_file(tiny_base: Path, tiny_folder: Path, cli: CommandLine, tmp_path: Path) -> None:
    assert cli("convert", tiny_base, *OPTIONS, "--keep-plain", "-o", tmp_path / "one.gguf").returncode == 0
    whole = GgufFile(tmp_path / "one.plain.gguf")
    plain = write_shards(whole, shares_of(whole, SplitRule(max_tensors=9), GgufModel(whole.path)), tmp_path, "p.gguf")[0]
    plan = tmp_path / "plan.safetensors"
    done = cli(
        "plan",
        tiny_folder,
        "--base",
        tiny_base,
        "--plain",
        plain,
        "-o",
        plan,
        "--defense",
        "ortho",
        "--seed",
        "3",
        "--quiet",
    )
    assert done.returncode == 0, done.stderr
    done = cli("apply", plan, "--plain", plain, "-o", tmp_path / "applied.gguf", "--quiet")
    assert done.returncode == 0, done.stderr
    applied = GgufFile(tmp_path / "applied.gguf")
    assert json.loads(cli("diff", tmp_path / "one.gguf", applied.path, "--json").stdout)["codes_changed"] == 0
    for flags, name in ((("--keep-split",), "kept"), (("--split-max-tensors", "9"), "cut")):
        done = cli("apply", plan, "--plain", plain, *flags, "-o", tmp_path / f"{name}.gguf", "--json")
        assert done.returncode == 0, done.stderr
        shares = shares_of(applied, SplitRule(max_tensors=9), GgufModel(applied.path))
        first = tmp_path / shard_name(f"{name}.gguf", 0, len(shares))
        assert json.loads(done.stdout)["outfile"] == first.name
        (tmp_path / f"{name}-expected").mkdir()
        expected = write_shards(applied, shares, tmp_path / f"{name}-expected", f"{name}.gguf")
        assert [shard.path.read_bytes() for shard in GgufModel(first).shards] == [path.read_bytes() for path in expected]
        assert not (tmp_path / f"{name}.gguf").exists()
    for source, name, more, said in (
        (plain, "kept.gguf", (), "exists"),
        (plain, "p.gguf", ("--overwrite",), "same file"),
        (tmp_path / "one.plain.gguf", "no.gguf", (), "in one piece"),
    ):
        done = cli("apply", plan, "--plain", source, "--keep-split", "-o", tmp_path / name, *more)
        assert done.returncode == 2
        assert said in " ".join(done.stderr.split())


def test_names_that_exist_are_not_replaced(tiny_base: Path, cli: CommandLine, tmp_path: Path) -> None:
    """Nor may shards of the input be, whatever is asked for."""
    base = GgufFile(tiny_base)
    cut = write_shards(base, shares_of(base, SplitRule(max_tensors=9), GgufModel(tiny_base)), tmp_path, "m.gguf")[0]
    before = sha256_of(shard.path for shard in GgufModel(cut).shards)
    for source, flags, said in (
        (cut, ("--keep-split", "--overwrite"), "same file"),
        (tiny_base, ("--split-max-size", "1M"), "exists"),
        (tiny_base, ("--split-max-size", "1M", "--split-max-tensors", "4"), "give one of"),
        (tiny_base, ("--split-max-size", "1K"), "number with M or G"),
    ):
        done = cli("convert", source, *OPTIONS, *flags, "-o", tmp_path / "m.gguf")
        assert done.returncode == 2
        assert said in " ".join(done.stderr.split())
    assert sha256_of(shard.path for shard in GgufModel(cut).shards) == before
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(("text", "size"), [("2G", 2_000_000_000), ("500M", 500_000_000), ("1m", 1_000_000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_split_size(text) == size


@pytest.mark.parametrize("text", ["", "2", "2K", "0G", "-1G", "1.5G", "G"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UnsupportedError, match="--split-max-size"):
        parse_split_size(text)
