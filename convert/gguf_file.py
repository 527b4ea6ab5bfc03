"""Read a GGUF header strictly, as hostile input: every size is checked against the file before anything is allocated.

Layout of a GGUF v2/v3 file (source: `docs/gguf.md` of the ggml project):

    "GGUF" | version u32 | tensor count u64 | key/value count u64
    key/value:   key string | value type u32 | value        string = length u64 + bytes
                                                            array  = item type u32 + count u64 + items
    tensor info: name string | n_dims u32 | dims u64... (fastest first) | type u32 | offset u64 (from the data section)
    padding to `general.alignment` (32) | data section

Only positions are kept: a vocabulary of 150 k strings is walked, not loaded, and values are decoded when asked for. The raw
bytes of each key/value entry stay addressable, so that a patched file can repeat them byte for byte.

`GgufFile` is one file; `GgufModel` is a model, one file or all the shards of a split one.
"""

import itertools
import mmap
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFValueType

from convert.reading import open_file
from quant_grids.errors import FormatError
from quant_grids.ggml_type import GgmlType, layout_of, type_of

DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # GGML_MAX_DIMS
PUBLISHED_TYPES = frozenset({GGMLQuantizationType.MXFP4})
"""Types that some models are published in (gpt-oss: its experts): a base may hold them, and they are not rounded again."""
MAX_NAME = 64  # GGML_MAX_NAME
MAX_KEY = 1024  # bytes; the longest that llama.cpp defines has some 60
MAX_FIELDS = 10_000  # metadata entries; a model has some 40, and each becomes an object of some 500 bytes
MAX_TENSORS = 100_000  # the largest mixture of experts with unmerged experts has some 20,000
MAX_ITEMS = 1 << 22  # of an array whose values are asked for; a vocabulary has at most some 300,000 tokens
MAX_HEADER = 1 << 30  # llama.cpp reads a header of this size in seconds; anything larger is not a model

_SCALARS: Mapping[int, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        name: the tensor's name.
        ggml_type: its storage type.
        shape: dimensions as in ggml, fastest first: `(columns, rows, ...)`.
        offset: position in the file, in bytes.
        n_bytes: stored size, in bytes.
        path: the file (shard) that holds it.
    """

    name: str
    ggml_type: GgmlType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int
    path: Path

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def columns(self) -> int:
        """Length of a row, the quantized dimension."""
        return self.shape[0]

    @property
    def rows(self) -> int:
        """Number of rows, experts included."""
        return self.n_weights // self.columns if self.columns else 0

    @property
    def row_bytes(self) -> int:
        """Stored size of a row, in bytes."""
        return self.n_bytes // self.rows if self.rows else 0


@dataclass(frozen=True)
class KeyValue:
    """One metadata entry and where its bytes lie in the file."""

    key: str
    value_type: GGUFValueType
    start: int
    value_start: int
    end: int


class GgufFile:
    """The header of one GGUF file.

    Attributes:
        path: the file.
        version: 2 or 3.
        alignment: of tensor offsets, in bytes.
        fields: metadata entries by key, in file order.
        tensors: tensor infos by name, in file order.
        data_start: where the data section begins, in bytes.
        size: of the file, in bytes.

    Raises:
        FormatError: the bytes cannot be a model; the message says what is wrong and where.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_file(path) as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < 24:
                    raise FormatError(f"{path.name} is {self.size} bytes; a GGUF header alone has 24")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                    self._parse(view)
        except OSError as error:
            raise FormatError(f"cannot read {path.name}: {error.strerror or error}") from error

    def _parse(self, view: mmap.mmap) -> None:
        cursor = _Cursor(view, self.path.name)
        if cursor.bytes(4) != b"GGUF":
            raise FormatError(f"{self.path.name} does not start with 'GGUF': it is not a GGUF file")
        self.version = cursor.number("<I")
        if self.version not in (2, 3):
            hint = " (big-endian files are not supported)" if self.version >> 16 else ""
            raise FormatError(f"{self.path.name} has GGUF version {self.version}; versions 2 and 3 can be read{hint}")
        n_tensors, n_fields = cursor.number("<Q"), cursor.number("<Q")
        for count, most, what in ((n_fields, MAX_FIELDS, "metadata entries"), (n_tensors, MAX_TENSORS, "tensors")):
            if count > most:
                raise FormatError(f"{self.path.name} claims {count} {what}; at most {most} are read")
        # The smallest entry there can be: a 1-letter key with a 1-byte value, a 1-letter name with no dimension.
        cursor.check_count(n_fields, 8 + 1 + 4 + 1, "metadata entries")
        cursor.check_count(n_tensors, 8 + 1 + 4 + 4 + 8, "tensors")
        self.fields: dict[str, KeyValue] = {}
        for _ in range(n_fields):
            field = cursor.key_value()
            if field.key in self.fields:
                raise FormatError(f"{self.path.name} holds the metadata key {field.key!r} twice")
            self.fields[field.key] = field
        self.infos_start = cursor.position
        infos = [cursor.tensor_info() for _ in range(n_tensors)]
        self.alignment = self._alignment()
        self.data_start = _aligned(cursor.position, self.alignment)
        self.tensors = self._place(infos)

    def _alignment(self) -> int:
        if "general.alignment" not in self.fields:
            return DEFAULT_ALIGNMENT
        value = self.value("general.alignment")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value & (value - 1) or value > 1 << 20:
            raise FormatError(f"{self.path.name}: general.alignment is {value!r}; it must be a power of two up to 1 MiB")
        return value

    def _place(self, infos: Sequence[tuple[str, tuple[int, ...], int, int]]) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for name, shape, type_number, offset in infos:
            where = f"{self.path.name}: tensor {name!r}"
            if name in tensors:
                raise FormatError(f"{where} is listed twice")
            ggml_type = _storage_type(type_number, where)
            n_bytes = stored_bytes(ggml_type, shape, where)
            if offset % self.alignment:
                raise FormatError(f"{where} starts at {offset}, not a multiple of the alignment {self.alignment}")
            start = self.data_start + offset
            if start + n_bytes > self.size:
                raise FormatError(
                    f"{where} ends at byte {start + n_bytes}, past the end of the file ({self.size}); the file is cut off"
                )
            tensors[name] = TensorInfo(name, ggml_type, shape, start, n_bytes, self.path)
        self._check_overlap(tensors)
        return tensors

    def _check_overlap(self, tensors: Mapping[str, TensorInfo]) -> None:
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in itertools.pairwise(ordered):
            if before.offset + before.n_bytes > after.offset:
                raise FormatError(f"{self.path.name}: tensors {before.name!r} and {after.name!r} overlap")

    def raw(self, start: int, end: int) -> bytes:
        """Bytes of the file from `start` to `end`."""
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def value(self, key: str) -> Any:
        """Decoded value of a metadata key (bool, int, float, str, or a list of them).

        Raises:
            KeyError: there is no such key.
            FormatError: a string is not UTF-8.
        """
        field = self.fields[key]
        raw = self.raw(field.value_start, field.end)
        if field.value_type == GGUFValueType.ARRAY and struct.unpack_from("<Q", raw, 4)[0] > MAX_ITEMS:
            raise FormatError(f"{self.path.name}: {key} is an array of more than {MAX_ITEMS} values")
        return _decode(raw, field.value_type, f"{self.path.name}: {key}")

    def get(self, key: str, default: Any = None) -> Any:
        """`value(key)`, or `default` when the key is absent."""
        return self.value(key) if key in self.fields else default

    def count(self, key: str, default: int) -> int:
        """A metadata value that must be a positive integer, or `default` when the key is absent.

        Raises:
            FormatError: it is something else.
        """
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FormatError(f"{self.path.name}: {key} is {value!r:.80}; it must be a positive integer")
        return value


class GgufModel:
    """A model in GGUF: one file, or a split one given by its first shard.

    Attributes:
        first: the first (or only) file; it carries the metadata.
        shards: all files in order.
        tensors: every tensor of every shard, by name.

    Raises:
        FormatError: a shard is missing, repeated, or broken.
    """

    def __init__(self, path: Path) -> None:
        self.first = GgufFile(path)
        count = self.first.get("split.count", 1)
        if not isinstance(count, int) or not 1 <= count <= 9999:
            raise FormatError(f"{path.name}: split.count is {count!r}")
        self.shards = [self.first]
        if count > 1:
            self.shards = [self.first if i == 0 else GgufFile(p) for i, p in enumerate(self._shard_paths(path, count))]
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self.shards:
            for name, tensor in shard.tensors.items():
                if name in self.tensors:
                    raise FormatError(f"tensor {name!r} is in {self.tensors[name].path.name} and in {shard.path.name}")
                self.tensors[name] = tensor

    def _shard_paths(self, path: Path, count: int) -> list[Path]:
        match = _SPLIT_NAME.match(path.name)
        if match is None or int(match["count"]) != count:
            raise FormatError(f"{path.name} is one of {count} shards but is not named NAME-00001-of-{count:05d}.gguf")
        if self.first.get("split.no", 0) != 0 or int(match["number"]) != 1:
            raise FormatError(f"{path.name} is not the first shard; give {match['stem']}-00001-of-{count:05d}.gguf")
        paths = [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
        for shard in paths:
            if not shard.is_file():
                raise FormatError(f"shard {shard.name} is missing beside {path.name}")
        return paths

    @property
    def path(self) -> Path:
        """The first file."""
        return self.first.path

    @property
    def architecture(self) -> str:
        """`general.architecture`, or 'unknown'."""
        return str(self.first.get("general.architecture", "unknown"))

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(tensor.n_weights for tensor in self.tensors.values())

    @property
    def n_bytes(self) -> int:
        """Size of all files together."""
        return sum(shard.size for shard in self.shards)


class _Cursor:
    """A position in the header; every read is checked against the end of the file first."""

    def __init__(self, view: mmap.mmap, name: str) -> None:
        self.view, self.name = view, name
        self.position = 0
        self.limit = min(len(view), MAX_HEADER)

    def need(self, size: int, what: str = "header") -> None:
        if size > self.limit - self.position:
            raise FormatError(
                f"{self.name}: the {what} at byte {self.position} needs {size} bytes, {self.limit - self.position} are left"
            )

    def check_count(self, count: int, smallest: int, what: str) -> None:
        if count * smallest > self.limit - self.position:
            raise FormatError(f"{self.name} claims {count} {what}, more than fit into its {self.limit} bytes")

    def bytes(self, size: int) -> bytes:
        self.need(size)
        self.position += size
        return self.view[self.position - size : self.position]

    def number(self, layout: str) -> int:
        return int(struct.unpack(layout, self.bytes(struct.calcsize(layout)))[0])

    def string(self, what: str, longest: int) -> str:
        size = self.number("<Q")
        if size > longest:
            raise FormatError(f"{self.name}: a {what} of {size} bytes at byte {self.position}; at most {longest} are read")
        self.need(size, what)
        raw = self.bytes(size)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.name}: the {what} at byte {self.position - size} is not UTF-8") from error

    def key_value(self) -> KeyValue:
        start = self.position
        key = self.string("metadata key", MAX_KEY)
        value_type = self._value_type(self.number("<I"), key)
        value_start = self.position
        self._skip(value_type, key)
        return KeyValue(key, value_type, start, value_start, self.position)

    def _value_type(self, number: int, key: str) -> GGUFValueType:
        try:
            return GGUFValueType(number)
        except ValueError:
            raise FormatError(f"{self.name}: metadata {key!r} has value type {number}, which GGUF does not define") from None

    def _skip(self, value_type: GGUFValueType, key: str) -> None:
        if value_type in _SCALARS:
            self.bytes(struct.calcsize(_SCALARS[value_type]))
        elif value_type == GGUFValueType.STRING:
            self._skip_string(key)
        else:
            item = self._value_type(self.number("<I"), key)
            count = self.number("<Q")
            if item == GGUFValueType.ARRAY:
                raise FormatError(f"{self.name}: metadata {key!r} is an array of arrays, which llama.cpp does not read")
            if item in _SCALARS:
                size = count * struct.calcsize(_SCALARS[item])
                self.need(size, f"array {key!r}")
                self.position += size
            else:
                self.check_count(count, 8, f"strings in {key!r}")
                self._skip_strings(count, key)

    def _skip_strings(self, count: int, key: str) -> None:
        """Walk over an array of strings: a vocabulary has some 100,000, so this loop is kept tight."""
        view, position, last = self.view, self.position, self.limit - 8
        size_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if position > last:
                break
            position += 8 + size_at(view, position)[0]
        else:
            if position <= self.limit:
                self.position = position
                return
        raise FormatError(f"{self.name}: the strings of {key!r} run past the end of the file")

    def _skip_string(self, key: str) -> None:
        size = self.number("<Q")
        self.need(size, f"string {key!r}")
        self.position += size

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("tensor name", MAX_KEY)
        if not 0 < len(name.encode()) < MAX_NAME:
            raise FormatError(f"{self.name}: a tensor name of {len(name)} characters; ggml allows 1 to {MAX_NAME - 1}")
        n_dims = self.number("<I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise FormatError(f"{self.name}: tensor {name!r} claims {n_dims} dimensions; ggml allows 1 to {MAX_DIMS}")
        shape = tuple(self.number("<Q") for _ in range(n_dims))
        return name, shape, self.number("<I"), self.number("<Q")


def _storage_type(number: int, where: str) -> GgmlType:
    try:
        ggml_type = type_of(number)
    except FormatError:
        raise FormatError(f"{where} has type number {number}, which this version does not know") from None
    if layout_of(ggml_type) is None:
        raise FormatError(f"{where} has type {ggml_type.name}, whose layout this version does not know")
    return ggml_type


def same_shape(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes, in ggml's order, differ in nothing but ones at their ends.

    llama.cpp leaves those out when it writes a tensor: a shared expert's gate of [n, 1] comes back as [n].
    """
    return all(a == b for a, b in itertools.zip_longest(one, other, fillvalue=1))


def stored_bytes(ggml_type: GgmlType, shape: Sequence[int], where: str) -> int:
    """Stored size of a tensor in bytes, computed with Python integers (no wrap-around).

    Raises:
        FormatError: an empty or absurd shape, or rows that are not a whole number of blocks.
    """
    layout = layout_of(ggml_type)
    assert layout is not None
    block, size = layout
    total = 1
    for dimension in shape:
        total *= dimension
    if min(shape) < 1 or total >= 1 << 62:
        raise FormatError(f"{where} has the shape {list(shape)}; every size must be at least 1 and the product below 2^62")
    if shape[0] % block:
        raise FormatError(f"{where} has rows of {shape[0]} weights, not a multiple of {ggml_type.name}'s block of {block}")
    return total // block * size


def _decode(raw: bytes, value_type: GGUFValueType, where: str) -> Any:
    if value_type in _SCALARS:
        return struct.unpack(_SCALARS[value_type], raw)[0]
    try:
        if value_type == GGUFValueType.STRING:
            return raw[8:].decode("utf-8")
        item, count = struct.unpack_from("<IQ", raw)
        if item in _SCALARS:
            return list(struct.unpack_from(f"<{count}{_SCALARS[item][1]}", raw, 12))
        strings, position = [], 12
        for _ in range(count):
            (size,) = struct.unpack_from("<Q", raw, position)
            strings.append(raw[position + 8 : position + 8 + size].decode("utf-8"))
            position += 8 + size
        return strings
    except UnicodeDecodeError as error:
        raise FormatError(f"{where} is not UTF-8") from error


def encode_key_value(key: str, value: bool | int | float | str) -> bytes:
    """Bytes of one metadata entry: bool, u32/u64/i64, f32 or string.

    Raises:
        FormatError: the value is out of range, or no text that UTF-8 can hold.
    """
    try:
        return _encoded(key, value)
    except (struct.error, OverflowError, UnicodeEncodeError) as error:
        raise FormatError(f"the metadata value {key!r:.80} = {value!r:.80} cannot be written to a GGUF") from error


def _encoded(key: str, value: bool | int | float | str) -> bytes:
    name = key.encode()
    head = struct.pack("<Q", len(name)) + name
    if isinstance(value, bool):
        return head + struct.pack("<I?", GGUFValueType.BOOL, value)
    if isinstance(value, int):
        if 0 <= value < 1 << 32:
            return head + struct.pack("<II", GGUFValueType.UINT32, value)
        unsigned = value >= 0
        return head + struct.pack(
            "<IQ" if unsigned else "<Iq", GGUFValueType.UINT64 if unsigned else GGUFValueType.INT64, value
        )
    if isinstance(value, float):
        return head + struct.pack("<If", GGUFValueType.FLOAT32, value)
    text = value.encode()
    return head + struct.pack("<IQ", GGUFValueType.STRING, len(text)) + text


def _aligned(position: int, alignment: int) -> int:
    return (position + alignment - 1) // alignment * alignment
