"""Byte-level BPE: the tokenizer of GPT-2, Llama 3, Qwen, SmolLM and most code models.

Text is cut into words (see `convert.hf.tokenizer.pretokenizers`), each word's UTF-8 bytes are written in a
printable 256-character alphabet, and pairs are merged in the order of the merges list. llama.cpp does the
same from the same two lists, so conversion is copying them, with each token marked as normal, control or
user-defined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gguf

from convert.hf.jsonfile import Section
from convert.hf.tokenizer.pretokenizers import limits_of, recognise
from convert.hf.tokenizer.vocabulary import (
    MAX_VOCABULARY,
    Vocabulary,
    added_type,
    fill_gaps,
    normaliser_warnings,
    place_tokens,
    read_added_tokens,
    strip_warnings,
)
from quant_grids.errors import FormatError

ORIGIN = "tokenizer.json"


def read_byte_bpe(tokenizer: Mapping[str, Any], settings: Section, rows: int, pre: str | None) -> Vocabulary:
    """Reads a byte-level BPE tokenizer.

    Args:
        tokenizer: The tokenizer.json.
        settings: The tokenizer_config.json.
        rows: `vocab_size` of config.json.
        pre: A pre-tokenizer name to use instead of recognising one.

    Raises:
        FormatError: Malformed lists.
        UnsupportedError: A normaliser llama.cpp does not have, or an unknown pre-tokenizer.
    """
    model = tokenizer["model"]
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(isinstance(text, str) for text in vocab):
        raise FormatError(f"{ORIGIN}: the BPE model has no vocabulary.")
    added = read_added_tokens(tokenizer.get("added_tokens") or [], ORIGIN)
    placed, by_id = place_tokens(vocab, added, rows, ORIGIN)
    types = [added_type(by_id[i]) if i in by_id else int(gguf.TokenType.NORMAL) for i in range(rows)]
    tokens = fill_gaps(placed, types, ORIGIN)
    key = "clean_up_tokenization_spaces"
    cleans = settings.flag(key, False) if settings.has(key) else None
    warnings = normaliser_warnings(tokenizer.get("normalizer"), known=(), forced=pre is not None)
    warnings += strip_warnings(added)
    name = pre or recognise(
        tokenizer.get("pre_tokenizer"), ignore_merges=model.get("ignore_merges") is True, cleans_spaces=cleans
    )
    return Vocabulary(
        model="gpt2",
        pre=name,
        tokens=tuple(tokens),
        types=tuple(types),
        merges=read_merges(model.get("merges")),
        added=added,
        warnings=tuple(warnings + limits_of(name)),
    )


def read_merges(merges: Any) -> tuple[str, ...]:
    """The merges as `left right` strings, from either form tokenizer.json keeps them in.

    Raises:
        FormatError: Not a list, or an entry that is not two non-empty strings without spaces.
    """
    if not isinstance(merges, list) or not 0 < len(merges) <= MAX_VOCABULARY:
        raise FormatError(f"{ORIGIN}: the BPE model has no usable list of merges.")
    lines = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(s, str) and s for s in pair):
            raise FormatError(f"{ORIGIN}: {merge!r:.80} is not a merge of two tokens.")
        if any(" " in side for side in pair):
            raise FormatError(f"{ORIGIN}: the merge {merge!r:.80} holds a space, which GGUF uses as the separator.")
        lines.append(f"{pair[0]} {pair[1]}")
    return tuple(lines)
