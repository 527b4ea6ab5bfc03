"""SentencePiece tokenizers: Llama 1 and 2, Mistral, Gemma, Phi-3.

Spaces are written as U+2581 and text is not cut into words. In the **BPE** kind, neighbouring pieces merge in order
of the merged piece's score; llama.cpp keeps just the scores (`tokenizer.ggml.model` = `llama`), and characters
without a piece become byte tokens `<0xXX>`, all 256 of which must be there. In the **unigram** kind, the segmentation
with the highest sum of scores wins (`t5`).

The same tokenizer comes in two forms. `tokenizer.model` has the scores. `tokenizer.json` has a list of merges
instead, from which scores are made again: the earlier a merge, the higher. That is exact only when *every* way to
split a piece into two pieces is in the list, because scores cannot forbid one; this is checked.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from convert.hf.jsonfile import MAX_TOKENIZER_BYTES, Section, read_bytes, read_optional_json
from convert.hf.tokenizer.byte_bpe import read_merges
from convert.hf.tokenizer.spm_model import BPE, UNIGRAM, Piece, SpmModel, parse_spm_model
from convert.hf.tokenizer.vocabulary import (
    AddedToken,
    Vocabulary,
    added_type,
    check_length,
    checked_id,
    fill_gaps,
    flatten_normaliser,
    normaliser_warnings,
    place_tokens,
    read_added_tokens,
    strip_warnings,
)
from quant_grids.errors import FormatError, UnsupportedError

SPACE = "\u2581"
ADDED_SCORE = -1000.0
"""Score of an added token; it is matched literally before any merging, so the value only has to be low."""
WAY_OUT = "make the base with llama.cpp's own converter: --converter PATH/convert_hf_to_gguf.py"


@dataclass(frozen=True)
class _Spacing:
    """What happens to spaces before pieces are looked for."""

    prefix: bool
    collapse: bool = False
    charsmap: bytes = b""
    optional_prefix: bool = False  # not put in front of text that begins with a space, as llama.cpp does


def read_spm_file(folder: Path, settings: Section, rows: int) -> Vocabulary:
    """Reads the `tokenizer.model` of a folder that has no tokenizer.json.

    Args:
        folder: The model folder.
        settings: tokenizer_config.json.
        rows: `vocab_size` of config.json.

    Raises:
        FormatError: Not a SentencePiece model, or one that does not fit the folder's other files.
        UnsupportedError: A kind llama.cpp does not have.
    """
    model = parse_spm_model(read_bytes(folder / "tokenizer.model", MAX_TOKENIZER_BYTES))
    spacing = _Spacing(model.add_dummy_prefix, model.remove_extra_whitespaces, model.charsmap)
    return _from_pieces(model, spacing, _listed_added(folder, settings), settings, rows, [])


def read_spm_json(folder: Path, tokenizer: Mapping[str, Any], settings: Section, rows: int) -> Vocabulary:
    """Reads a tokenizer.json whose model is SentencePiece's: BPE with byte fallback, or unigram.

    Args:
        folder: The model folder; its tokenizer.model, if it agrees with the tokenizer.json, gives the scores.
        tokenizer: The tokenizer.json.
        settings: tokenizer_config.json.
        rows: `vocab_size` of config.json.

    Raises:
        FormatError: Malformed lists.
        UnsupportedError: Rules that llama.cpp's SentencePiece cannot express.
    """
    origin = "tokenizer.json"
    added = read_added_tokens(tokenizer.get("added_tokens") or [], origin)
    model = tokenizer["model"]
    known = ("Prepend", "Replace", "Precompiled") if model.get("type") == "Unigram" else ("Prepend", "Replace")
    warnings = normaliser_warnings(tokenizer.get("normalizer"), known=(*known, "Strip"), forced=False)
    if model.get("type") == "Unigram":
        pieces = tuple(_unigram_pieces(model))
        unknown = [i for i, piece in enumerate(pieces) if piece.type == gguf.TokenType.UNKNOWN]
        roles = {"unk": unknown[0]} if unknown else {}
        spm = SpmModel(pieces, UNIGRAM, b"", True, False, model.get("byte_fallback") is True, roles)
    else:
        spm = _original(folder, model) or _bpe_model(model, {token.text for token in added})
    spacing = _json_spacing(tokenizer, [piece.text for piece in spm.pieces])
    return _from_pieces(spm, spacing, added, settings, rows, warnings)


def _from_pieces(
    model: SpmModel,
    spacing: _Spacing,
    added: Sequence[AddedToken],
    settings: Section,
    rows: int,
    warnings: list[str],
) -> Vocabulary:
    """Puts pieces and added tokens together."""
    origin = "the tokenizer"
    if model.kind not in (UNIGRAM, BPE):
        raise UnsupportedError(f"tokenizer.model is of SentencePiece's kind {model.kind}, not unigram or BPE; {WAY_OUT}.")
    placed, by_id = place_tokens(((piece.text, i) for i, piece in enumerate(model.pieces)), (), rows, origin)
    types = [piece.type for piece in model.pieces] + [int(gguf.TokenType.UNUSED)] * (rows - len(model.pieces))
    scores = [piece.score for piece in model.pieces] + [-10000.0] * (rows - len(model.pieces))
    for i, piece in enumerate(model.pieces):
        if piece.type == gguf.TokenType.USER_DEFINED:
            placed[i] = piece.text.replace(SPACE, " ")  # matched in the text as it comes, before spaces are escaped
    for token in added:
        if token.id >= rows:
            raise FormatError(f"{origin}: token id {token.id} is beyond the {rows} rows of config.json's vocab_size.")
        if types[token.id] != gguf.TokenType.UNKNOWN:
            types[token.id] = added_type(token)
            scores[token.id] = ADDED_SCORE
        spaced = types[token.id] == gguf.TokenType.USER_DEFINED
        placed[token.id] = token.text.replace(SPACE, " ") if spaced else token.text
        by_id[token.id] = token
    if not all(math.isfinite(score) for score in scores):
        raise FormatError(f"{origin}: a piece's score is not a finite number.")
    unigram = model.kind == UNIGRAM
    if unigram and "unk" not in model.roles:
        raise UnsupportedError("The unigram tokenizer has no unknown token, which llama.cpp's cannot do without.")
    if unigram and model.byte_fallback:
        warnings.append("llama.cpp's unigram tokenizer has no byte fallback: characters without a token become unknown.")
    tokens = fill_gaps(placed, types, origin)
    if not unigram:
        _check_bytes(tokens)
    prefix = settings.flag("add_prefix_space", spacing.prefix)
    if prefix and spacing.optional_prefix:
        warnings.append(
            "llama.cpp puts a space in front of every text and after every control token; this tokenizer not of a text that "
            "begins with one, and perhaps not after control tokens."
        )
    return Vocabulary(
        model="t5" if unigram else "llama",
        pre="default",
        tokens=tuple(tokens),
        types=tuple(types),
        scores=tuple(scores),
        add_space_prefix=prefix,
        remove_extra_whitespaces=spacing.collapse if unigram else None,
        charsmap=spacing.charsmap if unigram and spacing.charsmap else None,
        added=tuple(added),
        roles=model.roles,
        warnings=tuple(warnings + strip_warnings(added)),
    )


def _check_bytes(tokens: Sequence[str]) -> None:
    """llama.cpp aborts on a character without a token unless all byte tokens are there."""
    missing = {f"<0x{value:02X}>" for value in range(256)} - set(tokens)
    if missing:
        raise UnsupportedError(
            f"The SentencePiece BPE tokenizer lacks {len(missing)} of the 256 byte tokens, without which llama.cpp "
            "cannot tokenize characters it does not know."
        )


def _original(folder: Path, model: Mapping[str, Any]) -> SpmModel | None:
    """The folder's tokenizer.model, if it is the BPE model that the tokenizer.json was made from."""
    path = folder / "tokenizer.model"
    if not path.exists():
        return None
    try:
        spm = parse_spm_model(read_bytes(path, MAX_TOKENIZER_BYTES))
    except FormatError:
        return None  # some models call another format tokenizer.model; the tokenizer.json is enough
    vocab = model.get("vocab")
    same = isinstance(vocab, dict) and all(vocab.get(piece.text) == i for i, piece in enumerate(spm.pieces))
    return spm if same and spm.kind == BPE and len(spm.pieces) == len(vocab or ()) else None


def _bpe_model(model: Mapping[str, Any], added: set[str]) -> SpmModel:
    """Pieces with scores from a list of merges."""
    origin = "tokenizer.json"
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise FormatError(f"{origin}: the BPE model has no vocabulary.")
    ranks = {}
    for rank, merge in enumerate(read_merges(model.get("merges"))):
        left, right = merge.split(" ")
        ranks[left, right] = rank
    first: dict[str, int] = {}
    for (left, right), rank in ranks.items():
        first[left + right] = min(rank, first.get(left + right, rank))
    _check_complete(vocab, ranks, added)
    lowest = -float(len(ranks))
    unknown = model.get("unk_token")
    size = max(checked_id(i, origin) for i in vocab.values()) + 1
    if size > 2 * len(vocab):
        raise FormatError(f"{origin}: the ids of {len(vocab)} tokens go up to {size - 1}.")
    pieces = [Piece("", lowest, int(gguf.TokenType.UNUSED))] * size
    for text, i in vocab.items():
        kind = gguf.TokenType.UNKNOWN if text == unknown else gguf.TokenType.NORMAL
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = gguf.TokenType.BYTE
        pieces[i] = Piece(text, -float(first[text]) if text in first else lowest, int(kind))
    roles = {"unk": vocab[unknown]} if isinstance(unknown, str) and unknown in vocab else {}
    return SpmModel(tuple(pieces), BPE, b"", True, False, True, roles)


def _check_complete(vocab: Mapping[str, int], ranks: Mapping[tuple[str, str], int], added: set[str]) -> None:
    """Refuses merges that scores cannot express: a split into two tokens that the list leaves out."""
    missing = 0
    example = ("", "")
    for text in vocab:
        if text in added:
            continue
        check_length(text, "tokenizer.json")
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab and (left, right) not in ranks:
                missing, example = missing + 1, (left, right)
    if missing:
        raise UnsupportedError(
            f"The tokenizer's merges leave out {missing} ways to build its tokens (such as {example[0]!r:.40} + "
            f"{example[1]!r:.40}), which llama.cpp's SentencePiece tokenizer would use all the same; {WAY_OUT}."
        )


def _unigram_pieces(model: Mapping[str, Any]) -> Iterator[Piece]:
    """Pieces of a unigram model: a list of [text, score]."""
    entries, unknown = model.get("vocab"), model.get("unk_id")
    if not isinstance(entries, list) or not entries:
        raise FormatError("tokenizer.json: the unigram model has no vocabulary.")
    for i, entry in enumerate(entries):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise FormatError(f"tokenizer.json: {entry!r:.80} is not a unigram token.")
        if isinstance(entry[1], bool) or not isinstance(entry[1], int | float):
            raise FormatError(f"tokenizer.json: {entry!r:.80} has no score.")
        yield Piece(entry[0], float(entry[1]), int(gguf.TokenType.UNKNOWN if i == unknown else gguf.TokenType.NORMAL))


def _json_spacing(tokenizer: Mapping[str, Any], pieces: Sequence[str]) -> _Spacing:
    """How a tokenizer.json treats spaces, from its normaliser and pre-tokenizer."""
    prefix = collapse = optional = False
    charsmap = b""
    for step in flatten_normaliser(tokenizer.get("normalizer")):
        if step["type"] == "Prepend":
            prefix = True
        elif step["type"] == "Precompiled":
            charsmap = _decode_charsmap(step.get("precompiled_charsmap"))
        elif step["type"] == "Replace":
            pattern = step.get("pattern")
            if isinstance(pattern, Mapping) and pattern.get("Regex") in (" {2,}", r"\\s{2,}", " +"):
                collapse = True
            elif pattern != {"String": " "} or step.get("content") != SPACE:
                raise UnsupportedError(f"The tokenizer replaces {pattern!r:.60} in the text; {WAY_OUT}.")
    for step in _flatten_pre_tokenizer(tokenizer.get("pre_tokenizer")):
        if step["type"] == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            optional = scheme != "never" and not prefix
            prefix = prefix or optional
            if step.get("split", True) and any(SPACE in piece[1:] for piece in pieces):
                raise UnsupportedError(
                    "The tokenizer cuts text at spaces but has tokens with spaces inside, which llama.cpp would use; "
                    f"{WAY_OUT}."
                )
        elif step["type"] != "Split" or step.get("pattern") != {"String": " "}:
            # Splitting at " " does nothing once spaces have been replaced; Gemma's tokenizer does that.
            raise UnsupportedError(
                f"The SentencePiece tokenizer also cuts text with {step['type']}, which llama.cpp does not; {WAY_OUT}."
            )
    return _Spacing(prefix, collapse, charsmap, optional)


def _flatten_pre_tokenizer(node: Any) -> Iterator[Mapping[str, Any]]:
    if node is None:
        return
    if not isinstance(node, Mapping) or not isinstance(node.get("type"), str):
        raise FormatError(f"tokenizer.json: a pre-tokenizer has no type: {node!r:.120}.")
    if node["type"] == "Sequence":
        for child in (node.get("pretokenizers") or [])[:64]:
            yield from _flatten_pre_tokenizer(child)
    else:
        yield node


def _decode_charsmap(value: Any) -> bytes:
    """The normalisation table, which tokenizer.json keeps in base64; llama.cpp needs more than its 4-byte length."""
    try:
        raw = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except binascii.Error as error:
        raise FormatError("tokenizer.json: precompiled_charsmap is not base64.") from error
    if raw and (len(raw) < 5 or int.from_bytes(raw[:4], "little") + 4 >= len(raw)):
        raise FormatError("tokenizer.json: precompiled_charsmap is shorter than it says.")
    return raw


def _listed_added(folder: Path, settings: Section) -> tuple[AddedToken, ...]:
    """Added tokens of a folder without tokenizer.json: added_tokens.json, then tokenizer_config.json."""
    found: dict[int, AddedToken] = {}
    for text, i in read_optional_json(folder / "added_tokens.json").items():
        token_id = checked_id(i, "added_tokens.json")
        found[token_id] = AddedToken(token_id, text, special=False)
    listed = settings.section("added_tokens_decoder").values
    entries = [{**entry, "id": int(key)} for key, entry in listed.items() if key.isdecimal() and isinstance(entry, dict)]
    for token in read_added_tokens(entries, settings.origin):
        found[token.id] = token
    return tuple(found.values())
