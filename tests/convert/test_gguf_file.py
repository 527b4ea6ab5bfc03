"""Hostile GGUF files: a sentence instead of a crash, and no memory taken for what a file merely claims."""

import resource
import struct
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

from convert.gguf_file import GgufFile, GgufModel, stored_bytes
from quant_grids.errors import FormatError


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def field(key: str, value_type: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", value_type) + value


def info(name: str, dims: tuple[int, ...], type_number: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_number, offset)


def gguf(fields: list[bytes], infos: list[bytes], data: bytes = b"", version: int = 3, **claimed: int) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, claimed.get("n_tensors", len(infos)), claimed.get("n_fields", len(fields)))
    header = head + b"".join(fields) + b"".join(infos)
    return header + b"\0" * (-len(header) % 32) + data


ARCHITECTURE = field("general.architecture", GGUFValueType.STRING, text("llama"))
SOUND = gguf([ARCHITECTURE], [info("a.weight", (8, 2)), info("b.weight", (4,), 0, 64)], bytes(96))
MANY_DIMS = text("a") + struct.pack("<I", 1_000_000) + struct.pack("<Q", 2) * 8

HOSTILE = {
    "empty": (b"", "24"),
    "wrong magic": (b"GGML" + SOUND[4:], "does not start with 'GGUF'"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + SOUND[8:], "big-endian"),
    "version 1": (gguf([ARCHITECTURE], [], bytes(32), version=1), "version 1"),
    "truncated data": (SOUND[:-24], "past the end of the file"),
    "truncated header": (SOUND[:70], "bytes"),
    "huge field count": (gguf([ARCHITECTURE], [], bytes(64), n_fields=1 << 60), "claims"),
    "huge tensor count": (gguf([ARCHITECTURE], [], bytes(64), n_tensors=1 << 40), "claims"),
    "huge key": (gguf([struct.pack("<Q", 1 << 62) + b"k"], [], bytes(64)), "at most 1024"),
    "huge array": (gguf([field("x", GGUFValueType.ARRAY, struct.pack("<IQ", 6, 1 << 61))], [], bytes(64)), "array"),
    "huge string array": (gguf([field("x", GGUFValueType.ARRAY, struct.pack("<IQ", 8, 1 << 50))], [], bytes(64)), "claims"),
    "string in an array past the end": (
        gguf([field("x", GGUFValueType.ARRAY, struct.pack("<IQQ", 8, 1, 1 << 40))], [], bytes(64)),
        "run past the end",
    ),
    "fewer strings than claimed": (
        gguf([field("x", GGUFValueType.ARRAY, struct.pack("<IQ", 8, 9) + text("a" * 30))], [], bytes(32)),
        "run past the end",
    ),
    "array of arrays": (gguf([field("x", GGUFValueType.ARRAY, struct.pack("<IQ", 9, 1))], [], bytes(64)), "array of arrays"),
    "unknown value type": (gguf([field("x", 77, b"")], [], bytes(64)), "value type 77"),
    "key twice": (gguf([ARCHITECTURE, ARCHITECTURE], [], bytes(64)), "twice"),
    "key not UTF-8": (gguf([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 1)], [], bytes(64)), "UTF-8"),
    "a million dims": (gguf([], [MANY_DIMS], bytes(64)), "1000000 dimensions"),
    "no dims": (gguf([], [info("a", ())], bytes(64)), "0 dimensions"),
    "product wraps": (gguf([], [info("a", (1 << 33, 1 << 33, 4))], bytes(64)), "below 2^62"),
    "zero size": (gguf([], [info("a", (0, 4))], bytes(64)), "at least 1"),
    "unknown tensor type": (gguf([], [info("a", (32,), 4)], bytes(64)), "type number 4"),
    "row not whole blocks": (gguf([], [info("a", (255, 2), 12)], bytes(4096)), "block of 256"),
    "tensor past the end": (gguf([], [info("a", (1 << 20,), 0)], bytes(64)), "past the end"),
    "offset wraps": (gguf([], [info("a", (8,), 0, (1 << 64) - 32)], bytes(64)), "past the end"),
    "offset unaligned": (gguf([], [info("a", (8,), 0, 8)], bytes(64)), "alignment"),
    "overlap": (gguf([], [info("a", (16,)), info("b", (16,), 0, 32)], bytes(128)), "overlap"),
    "tensor twice": (gguf([], [info("a", (8,)), info("a", (8,), 0, 32)], bytes(64)), "listed twice"),
    "long name": (gguf([], [info("a" * 64, (8,))], bytes(64)), "tensor name"),
    "alignment zero": (gguf([field("general.alignment", 4, struct.pack("<I", 0))], [], bytes(64)), "power of two"),
    "alignment 48": (gguf([field("general.alignment", 4, struct.pack("<I", 48))], [], bytes(64)), "power of two"),
    "alignment is text": (gguf([field("general.alignment", 8, text("32"))], [], bytes(64)), "power of two"),
}


def test_the_sound_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(SOUND)
    file = GgufFile(path)
    assert file.value("general.architecture") == "llama"
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {"a.weight": (8, 2), "b.weight": (4,)}
    assert file.tensors["a.weight"].rows == 2


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    content, words = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=words.replace("^", r"\^")) as caught:
        GgufFile(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024, f"{grown} KiB for a file of {len(content)} bytes"
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_the_traps_are_real() -> None:
    """A reader that multiplies 64-bit integers would see a tensor of 0 weights where 2**68 are claimed."""
    wrapped = (1 << 33) * (1 << 33) * 4 % (1 << 64)
    assert wrapped == 0
    with pytest.raises(FormatError, match="below"):
        stored_bytes(GGMLQuantizationType.F32, (1 << 33, 1 << 33, 4), "a")


def test_agrees_with_ggufs_own_reader(tiny_base: Path) -> None:
    ours, theirs = GgufFile(tiny_base), GGUFReader(tiny_base)
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.offset, mine.n_bytes, mine.ggml_type) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert mine.shape == tuple(int(size) for size in tensor.shape)
    for key, entry in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.value(key) == entry.contents(), key


def test_missing_shard_is_named(tmp_path: Path) -> None:
    fields = [field("split.count", 2, struct.pack("<H", 2)), field("split.no", 2, struct.pack("<H", 0))]
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(gguf(fields, [], bytes(32)))
    with pytest.raises(FormatError, match=r"m-00002-of-00002.gguf is missing"):
        GgufModel(path)


def test_second_shard_is_refused(tmp_path: Path) -> None:
    fields = [field("split.count", 2, struct.pack("<H", 2)), field("split.no", 2, struct.pack("<H", 1))]
    path = tmp_path / "m-00002-of-00002.gguf"
    path.write_bytes(gguf(fields, [], bytes(32)))
    with pytest.raises(FormatError, match="not the first shard"):
        GgufModel(path)
