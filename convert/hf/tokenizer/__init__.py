"""Tokenizers: from the files of a Hugging Face folder to the arrays a GGUF carries."""

from __future__ import annotations

from convert.hf.tokenizer.reader import Tokenizer, read_tokenizer
from convert.hf.tokenizer.special import SpecialTokens
from convert.hf.tokenizer.vocabulary import Vocabulary

__all__ = ["SpecialTokens", "Tokenizer", "Vocabulary", "read_tokenizer"]
