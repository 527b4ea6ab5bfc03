"""Seeded mutations: bytes anywhere, lengths and counts where a format has them, values where JSON has them."""

import json
import random
import struct
from typing import Any

NUMBERS = (
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 5, 2**31, 2**70, -(2**70), 1e308, float("nan"), float("inf"), "", "x", "\ud800", "\x1b[2J[/x]",
    "../../etc/passwd", "x" * 5000, [], [[]], [1], {}, {"a": {}}, [None] * 100,
)  # fmt: skip


def mutated_bytes(rng: random.Random, data: bytes, reach: int) -> bytes:
    """Bytes with one to eight faults among the first `reach`: flips, numbers of every width, cuts, copies, insertions."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        place = rng.randrange(max(1, min(reach, len(made))))
        kind = rng.randrange(6)
        if kind == 0:
            made[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            width, layout = rng.choice(((1, "<B"), (2, "<H"), (4, "<I"), (8, "<Q")))
            made[place : place + width] = struct.pack(layout, rng.choice(NUMBERS) % (1 << (8 * width)))
        elif kind == 2:
            del made[place : place + rng.choice((1, 4, 8, 64))]
        elif kind == 3:
            made[place:place] = made[place : place + rng.choice((1, 8, 32))]
        elif kind == 4:
            made[place:place] = rng.randbytes(rng.choice((1, 4, 8)))
        elif rng.random() < 0.3:
            del made[place:]
    return bytes(made)


def mutated_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with one fault somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        return [*value[:place], mutated_value(rng, value[place]), *value[place + 1 :]]
    return rng.choice(VALUES)


def mutated_json(rng: random.Random, text: bytes) -> bytes:
    """A JSON document with faults in its values, or in its bytes."""
    if rng.random() < 0.2:
        return mutated_bytes(rng, text, len(text))
    value = json.loads(text)
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = mutated_value(rng, value)
    return json.dumps(value).encode()


def mutated_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with faults in its header's values, or in its bytes."""
    (length,) = struct.unpack_from("<Q", data)
    if rng.random() < 0.4:
        return mutated_bytes(rng, data, length + 64)
    header = mutated_json(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]
