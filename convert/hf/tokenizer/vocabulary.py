"""What a GGUF needs to know of a tokenizer, in one value.

llama.cpp rebuilds a tokenizer from a few arrays: the token strings, a type for each (may it be produced from
text, is it a control token, ...), and either merges (BPE) or scores (SentencePiece). This module holds that
value and the two steps every kind of tokenizer shares: marking added tokens and filling the rows that have no
token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gguf

from convert.hf.jsonfile import MAX_DIMENSION
from quant_grids.errors import FormatError, UnsupportedError

MAX_VOCABULARY = 1 << 22
"""Four million tokens, sixteen times the largest vocabulary in use."""

MAX_TOKEN_LENGTH = 1024
"""Characters in a token; the longest in use (runs of spaces or dashes) have a few hundred."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before the tokenizer's own rules apply.

    Attributes:
        id: Its id.
        text: Its literal text.
        special: The tokenizer calls it special (control tokens, as opposed to added words).
        lstrip: It swallows white space before it.
        rstrip: It swallows white space after it.
    """

    id: int
    text: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms.

    Attributes:
        model: `tokenizer.ggml.model`: `gpt2` (byte-level BPE), `llama` (SentencePiece BPE), `t5` (unigram).
        pre: `tokenizer.ggml.pre`, the name of the pre-tokenizer.
        tokens: Token strings by id; byte-level BPE keeps its printable byte alphabet.
        types: `gguf.TokenType` of each token.
        scores: SentencePiece scores, or None.
        merges: BPE merges, `left right`, by rank, or None.
        add_space_prefix: Whether text gets a leading space (SentencePiece), or None for llama.cpp's default.
        remove_extra_whitespaces: Whether runs of spaces collapse (unigram), or None.
        charsmap: SentencePiece's compiled normalisation table (unigram), or None.
        added: The added tokens.
        roles: Ids by role (`unk`, `bos`, ...) that the tokenizer itself names, for when no other file does.
        warnings: What llama.cpp will do differently from the original tokenizer.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    merges: tuple[str, ...] | None = None
    add_space_prefix: bool | None = None
    remove_extra_whitespaces: bool | None = None
    charsmap: bytes | None = None
    added: tuple[AddedToken, ...] = ()
    roles: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def read_added_tokens(entries: Any, origin: str) -> tuple[AddedToken, ...]:
    """Reads the `added_tokens` list of a tokenizer.json.

    Raises:
        FormatError: An entry lacks an id or text, or an id is out of range.
    """
    if not isinstance(entries, list):
        raise FormatError(f"{origin}: added_tokens must be a list.")
    tokens = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
            raise FormatError(f"{origin}: an added token has no text: {entry!r:.120}.")
        check_length(entry["content"], origin)
        tokens.append(
            AddedToken(
                id=checked_id(entry.get("id"), origin),
                text=entry["content"],
                special=entry.get("special") is True,
                lstrip=entry.get("lstrip") is True,
                rstrip=entry.get("rstrip") is True,
            )
        )
    return tuple(tokens)


def checked_id(value: Any, origin: str) -> int:
    """A token id, or FormatError when it is not one."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_DIMENSION:
        raise FormatError(f"{origin}: {value!r:.80} is not a token id.")
    return value


def check_length(text: str, origin: str) -> None:
    """Raises FormatError for a token longer than any real one, before anything takes time that grows with it."""
    if len(text) > MAX_TOKEN_LENGTH:
        raise FormatError(f"{origin}: a token of {len(text)} characters, more than {MAX_TOKEN_LENGTH}: {text!r:.40}.")


def looks_like_control(text: str) -> bool:
    """Whether an added token is plainly a control token although its tokenizer does not call it special.

    Some models flag `<|fim_prefix|>` or `<pad>` as ordinary added words. llama.cpp parses control tokens from
    text only when asked to, so the stricter type is the safe one: user text cannot then smuggle them in.
    """
    framed = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    if any(text.startswith(left) and text.endswith(right) and len(text) > len(left) for left, right in framed):
        return True
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def added_type(token: AddedToken) -> int:
    """The GGUF type of an added token."""
    control = token.special or looks_like_control(token.text)
    return int(gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED)


def place_tokens(
    pieces: Mapping[str, int] | Iterable[tuple[str, int]], added: Sequence[AddedToken], rows: int, origin: str
) -> tuple[list[str | None], dict[int, AddedToken]]:
    """Puts every piece and added token at its id.

    Args:
        pieces: The model's own tokens with their ids.
        added: The added tokens; an added token replaces the piece with its id.
        rows: Number of embedding rows, `vocab_size` of config.json.
        origin: File name for messages.

    Returns:
        Token string by id (None where there is none), and the added tokens by id.

    Raises:
        FormatError: An id outside the embedding, or one text under two ids (llama.cpp would abort on it).
    """
    if rows > MAX_VOCABULARY:
        raise FormatError(f"config.json: vocab_size {rows} is more than {MAX_VOCABULARY}.")
    placed: list[str | None] = [None] * rows
    items = pieces.items() if isinstance(pieces, Mapping) else pieces
    for text, value in items:
        check_length(text, origin)
        token_id = checked_id(value, origin)
        if token_id >= rows:
            raise FormatError(f"{origin}: token id {token_id} is beyond the {rows} rows of config.json's vocab_size.")
        if placed[token_id] is not None:
            raise FormatError(f"{origin}: {placed[token_id]!r:.60} and {text!r:.60} share the id {token_id}.")
        placed[token_id] = text
    by_id: dict[int, AddedToken] = {}
    for token in added:
        if token.id >= rows:
            raise FormatError(f"{origin}: token id {token.id} is beyond the {rows} rows of config.json's vocab_size.")
        by_id[token.id] = token
        placed[token.id] = token.text
    return placed, by_id


def fill_gaps(placed: Sequence[str | None], types: list[int], origin: str) -> list[str]:
    """Names the rows without a token `[PADi]`, marks them unused, and checks that every string is unique.

    Args:
        placed: Token strings by id, None for a gap. Not modified.
        types: Token types by id; the entries of gaps are set to UNUSED.
        origin: File name for messages.

    Raises:
        FormatError: Two ids have the same text.
    """
    tokens = []
    for token_id, text in enumerate(placed):
        if text is None:
            types[token_id] = int(gguf.TokenType.UNUSED)
            text = f"[PAD{token_id}]"
        tokens.append(text or f"[EMPTY_{token_id}]")
    if len(set(tokens)) != len(tokens):
        seen: dict[str, int] = {}
        for token_id, text in enumerate(tokens):
            if text in seen:
                raise FormatError(f"{origin}: {text!r:.60} is both token {seen[text]} and token {token_id}.")
            seen[text] = token_id
    return tokens


def flatten_normaliser(node: Any) -> list[Mapping[str, Any]]:
    """The steps of a tokenizer.json's `normalizer`, in order; raises FormatError when it is malformed."""
    if node is None:
        return []
    if not isinstance(node, Mapping) or not isinstance(node.get("type"), str):
        raise FormatError(f"tokenizer.json: a normaliser has no type: {node!r:.120}.")
    if node["type"] != "Sequence":
        return [node]
    children = node.get("normalizers")
    if not isinstance(children, list) or len(children) > 64:
        raise FormatError("tokenizer.json: a normaliser sequence has no list of normalisers.")
    return [step for child in children for step in flatten_normaliser(child)]


def normaliser_warnings(node: Any, *, known: Sequence[str], forced: bool) -> list[str]:
    """What is lost of a normaliser that llama.cpp does not run.

    Unicode composition is a warning, because nearly all text is composed already; anything else (lower-casing, say)
    makes another tokenizer.

    Args:
        node: The tokenizer.json's `normalizer`.
        known: Kinds of steps that the caller has taken into account.
        forced: The user named a pre-tokenizer, taking responsibility for the rest.

    Raises:
        UnsupportedError: A step that changes ordinary text, unless `forced`.
    """
    warnings = []
    for step in flatten_normaliser(node):
        kind = step["type"]
        if kind in known:
            continue
        if kind in ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled"):
            warnings.append(
                f"The tokenizer first normalises characters ({kind}) and llama.cpp does not: text that this would "
                "change is tokenized differently."
            )
        elif forced:
            warnings.append(f"The tokenizer's normaliser {kind} is left out; going on because --pre was given.")
        else:
            raise UnsupportedError(
                f"The tokenizer normalises text with {kind}, which llama.cpp does not do for this kind of tokenizer; "
                "use --pre NAME to go on regardless, or llama.cpp's own converter with --converter PATH."
            )
    return warnings


def strip_warnings(added: Sequence[AddedToken]) -> list[str]:
    """What to say about added tokens that swallow neighbouring white space, which llama.cpp's do not."""
    texts = [token.text for token in added if token.lstrip or token.rstrip]
    if not texts:
        return []
    shown = ", ".join(texts[:4]) + (", ..." if len(texts) > 4 else "")
    return [f"{len(texts)} added tokens swallow white space around them ({shown}); llama.cpp keeps that white space."]
