"""Reads the parts of a SentencePiece `tokenizer.model` that a GGUF needs.

The file is a protocol-buffer message (`ModelProto` in sentencepiece's `sentencepiece_model.proto`). The wire format
is simple enough to read here in a few lines, which needs no compiled schema, gives the normalisation table that the
`sentencepiece` module does not hand out, and treats a hostile file as bytes with checked lengths:

    message := (key value)*      key = field number << 3 | wire type, a varint
    wire type 0: varint   1: 8 bytes   2: length (varint), then that many bytes   5: 4 bytes
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from convert.hf.tokenizer.vocabulary import MAX_VOCABULARY
from quant_grids.errors import FormatError

UNIGRAM, BPE = 1, 2
"""Values of `TrainerSpec.model_type`."""

Field = tuple[int, int | bytes]
_ROLES = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}  # TrainerSpec field, default


@dataclass(frozen=True)
class Piece:
    """One token.

    Attributes:
        text: Its string, with U+2581 for spaces.
        score: Log probability (unigram), or minus its rank (BPE).
        type: Normal 1, unknown 2, control 3, user-defined 4, unused 5, byte 6: GGUF's numbers too.
    """

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SpmModel:
    """A SentencePiece model.

    Attributes:
        pieces: The tokens by id.
        kind: `UNIGRAM` or `BPE`.
        charsmap: The compiled normalisation table; empty for none.
        add_dummy_prefix: A space is put in front of the text.
        remove_extra_whitespaces: Runs of spaces collapse, and spaces at the ends go.
        byte_fallback: Characters without a token become byte tokens.
        roles: Ids of the `unk`, `bos`, `eos` and `pad` pieces, where there are such.
    """

    pieces: tuple[Piece, ...]
    kind: int
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    byte_fallback: bool
    roles: Mapping[str, int]


def parse_spm_model(raw: bytes) -> SpmModel:
    """Parses the bytes of a tokenizer.model; raises FormatError when they are not one."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normaliser: dict[int, int | bytes] = {}
    for number, value in _fields(raw):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
            if len(pieces) > MAX_VOCABULARY:
                raise FormatError(f"tokenizer.model has more than {MAX_VOCABULARY} pieces.")
        elif number == 2 and isinstance(value, bytes):
            trainer.update(_fields(value))
        elif number == 3 and isinstance(value, bytes):
            normaliser.update(_fields(value))
    if not pieces:
        raise FormatError("tokenizer.model holds no pieces; is it a SentencePiece model?")
    kind, charsmap = trainer.get(3, UNIGRAM), normaliser.get(2, b"")
    ids = {role: trainer.get(number, usual) for role, (number, usual) in _ROLES.items()}
    return SpmModel(
        pieces=tuple(pieces),
        kind=kind if isinstance(kind, int) else 0,
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        add_dummy_prefix=bool(normaliser.get(3, 1)),
        remove_extra_whitespaces=bool(normaliser.get(4, 1)),
        byte_fallback=bool(trainer.get(35, 0)),
        # "None" is -1, which a varint holds as 2**64 - 1.
        roles={role: i for role, i in ids.items() if isinstance(i, int) and 0 <= i < len(pieces)},
    )


def _piece(raw: bytes) -> Piece:
    fields = dict(_fields(raw))
    text, score, kind = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4 or not isinstance(kind, int):
        raise FormatError("tokenizer.model: a piece has fields of the wrong kind.")
    try:
        return Piece(text.decode("utf-8"), struct.unpack("<f", score)[0], kind)
    except UnicodeDecodeError as error:
        raise FormatError("tokenizer.model: a piece is not UTF-8.") from error


def _fields(raw: bytes) -> Iterator[Field]:
    """The fields of a message: varints as integers, everything else as bytes."""
    position = 0
    while position < len(raw):
        key, position = _varint(raw, position)
        wire = key & 7
        if wire == 0:
            value, position = _varint(raw, position)
            yield key >> 3, value
            continue
        if wire == 2:
            length, position = _varint(raw, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise FormatError(f"tokenizer.model is not a SentencePiece model (wire type {wire} at byte {position}).")
        if length > len(raw) - position:
            raise FormatError(f"tokenizer.model ends inside a field of {length} bytes.")
        yield key >> 3, raw[position : position + length]
        position += length


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    """A variable-length integer and the position after it; at most ten bytes, as protocol buffers have it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(raw):
            raise FormatError("tokenizer.model ends inside a number.")
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise FormatError("tokenizer.model holds a number of more than ten bytes.")
