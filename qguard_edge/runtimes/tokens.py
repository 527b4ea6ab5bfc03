"""Text to token ids by llama.cpp's own tokenizer: the base GGUF is all it needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.llama_limits import LlamaRuntimeError
from qguard_edge.runtimes.llama import LlamaModel
from quant_grids.errors import QGuardError


class TokensError(QGuardError):
    """llama.cpp cannot read the model's tokenizer."""


@dataclass(frozen=True)
class Tokens:
    """Tokenized texts.

    Attributes:
        texts: token ids of each text, as the text stands.
        begin: what the model expects before a text; empty for most that have been trained without it.
    """

    texts: tuple[tuple[int, ...], ...]
    begin: tuple[int, ...]


def llama_tokens(model: Path, texts: Sequence[str], *, parse_special: bool = False) -> Tokens:
    """Token ids of texts.

    Args:
        model: GGUF, first shard of a split one.
        texts: any.
        parse_special: read `<|im_start|>` and the like as control tokens.

    Raises:
        TokensError: llama.cpp cannot load the tokenizer.
    """
    try:
        with LlamaModel(model, vocab_only=True) as vocabulary:
            made = tuple(tuple(vocabulary.tokenize(text, parse_special=parse_special)) for text in texts)
            # What llama.cpp puts before a text, told from one that it tokenizes with and without.
            bare, whole = vocabulary.tokenize("a"), vocabulary.tokenize("a", add_special=True)
    except LlamaRuntimeError as error:
        raise TokensError(f"no tokens from {model.name}: {error}") from error
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return Tokens(made, tuple(whole[:start]))
