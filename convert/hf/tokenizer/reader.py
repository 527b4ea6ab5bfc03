"""Finds out which kind of tokenizer a folder has, reads it, and writes it into a GGUF.

The kinds, told apart by what the files say and not by the model's name:

* tokenizer.json with a BPE model over bytes (`ByteLevel`): `byte_bpe`;
* a SentencePiece `tokenizer.model`, or a tokenizer.json with byte fallback or a unigram model:
  `sentencepiece`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import tokenizers

from convert.hf.jsonfile import MAX_TOKENIZER_BYTES, Section, parse_json, read_bytes, read_optional_json
from convert.hf.tokenizer.byte_bpe import read_byte_bpe
from convert.hf.tokenizer.pretokenizers import recognise
from convert.hf.tokenizer.sentencepiece import read_spm_file, read_spm_json
from convert.hf.tokenizer.special import Probe, SpecialTokens, read_special
from convert.hf.tokenizer.vocabulary import Vocabulary
from quant_grids.errors import FormatError, QGuardError, UnsupportedError


@dataclass(frozen=True)
class Tokenizer:
    """A folder's tokenizer, ready to be written.

    Attributes:
        vocabulary: Tokens, types, merges or scores.
        special: Roles, additions and chat templates.
    """

    vocabulary: Vocabulary
    special: SpecialTokens

    @property
    def warnings(self) -> tuple[str, ...]:
        """What llama.cpp will do differently from the original tokenizer."""
        return self.vocabulary.warnings + self.special.warnings

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Adds the `tokenizer.*` metadata."""
        v, s = self.vocabulary, self.special
        writer.add_tokenizer_model(v.model)
        writer.add_tokenizer_pre(v.pre)
        writer.add_token_list(list(v.tokens))
        writer.add_token_types(list(v.types))
        if v.scores is not None:
            writer.add_token_scores(list(v.scores))
        if v.merges is not None:
            writer.add_token_merges(list(v.merges))
        if v.add_space_prefix is not None:
            writer.add_add_space_prefix(v.add_space_prefix)
        if v.remove_extra_whitespaces is not None:
            writer.add_remove_extra_whitespaces(v.remove_extra_whitespaces)
        if v.charsmap is not None:
            writer.add_precompiled_charsmap(v.charsmap)
        for role, token_id in s.ids.items():
            getattr(writer, f"add_{role}_token_id")(token_id)
        writer.add_add_bos_token(s.add_bos)
        writer.add_add_eos_token(s.add_eos)
        if set(s.templates) == {"default"}:
            writer.add_chat_template(s.templates["default"])
        elif s.templates:
            writer.add_chat_template([{"name": name, "template": text} for name, text in s.templates.items()])


def read_tokenizer(folder: Path, config: Section, rows: int, *, pre: str | None = None) -> Tokenizer:
    """Reads the tokenizer of a folder.

    Args:
        folder: The model folder.
        config: config.json.
        rows: Rows of the embedding.
        pre: llama.cpp pre-tokenizer name to use instead of recognising one.

    Raises:
        FormatError: Missing or malformed files.
        UnsupportedError: A kind of tokenizer, or a pre-tokenizer, that llama.cpp or this converter does not
            have.
    """
    settings = Section(read_optional_json(folder / "tokenizer_config.json"), "tokenizer_config.json")
    path = folder / "tokenizer.json"
    if not path.exists():
        if not (folder / "tokenizer.model").exists():
            raise FormatError(
                f"{folder} has neither tokenizer.json nor tokenizer.model; loading and saving the tokenizer with "
                "transformers writes the former."
            )
        vocabulary = read_spm_file(folder, settings, rows)
        return Tokenizer(vocabulary, read_special(folder, config, settings, vocabulary, Probe()))
    text = read_bytes(path, MAX_TOKENIZER_BYTES)
    raw = parse_json(text, path.name)
    model = raw.get("model")
    if not isinstance(model, Mapping):
        raise FormatError("tokenizer.json has no model.")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind == "BPE" and (_over_bytes(raw.get("pre_tokenizer")) or not model.get("byte_fallback")):
        vocabulary = read_byte_bpe(raw, settings, rows, pre)
    elif kind in ("BPE", "Unigram"):
        vocabulary = read_spm_json(folder, raw, settings, rows)
    else:
        raise UnsupportedError(
            f"tokenizer.json has a {kind!r:.40} tokenizer; this converter knows BPE and Unigram. "
            "Use llama.cpp's own converter with --converter PATH."
        )
    return Tokenizer(vocabulary, read_special(folder, config, settings, vocabulary, _probe(text)))


def _over_bytes(node: Any) -> bool:
    """Whether a pre-tokenizer turns text into the byte alphabet; some such tokenizers set `byte_fallback` idly."""
    if not isinstance(node, Mapping):
        return False
    children = node.get("pretokenizers")
    return node.get("type") == "ByteLevel" or (isinstance(children, list) and any(map(_over_bytes, children[:64])))


def _probe(text: bytes) -> Probe:
    """Lets the tokenizer wrap a text of one word and looks at what it put around it."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text.decode("utf-8-sig"))
        bare = tokenizer.encode("a", add_special_tokens=False).ids
        whole = tokenizer.encode("a", add_special_tokens=True).ids
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the Rust binding raises bare Exception, and panics that are not even that
        raise FormatError(f"tokenizer.json cannot be loaded: {error}.") from error
    extra = len(whole) - len(bare)
    for start in range(extra + 1):
        if whole[start : start + len(bare)] == bare:
            return Probe(tuple(whole[:start]), tuple(whole[start + len(bare) :]))
    return Probe((), ())


def guess_pre_tokenizer(folder: Path) -> str | None:
    """llama.cpp's name for a folder's pre-tokenizer, or None where there is none that this converter recognises."""
    try:
        raw = parse_json(read_bytes(folder / "tokenizer.json", MAX_TOKENIZER_BYTES), "tokenizer.json")
        model = raw.get("model")
        merges_ignored = isinstance(model, Mapping) and model.get("ignore_merges") is True
        return recognise(raw.get("pre_tokenizer"), ignore_merges=merges_ignored, cleans_spaces=None)
    except QGuardError:
        return None
