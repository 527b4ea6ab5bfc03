"""Which pre-tokenizer of llama.cpp a byte-level BPE tokenizer has.

Before merging bytes, such a tokenizer cuts text into words with regular expressions. tokenizer.json spells
them out; llama.cpp knows each set by a name (`tokenizer.ggml.pre`) and has the expressions built in. Picking
the wrong name gives a model that loads, answers, and is quietly worse, so the name is chosen by comparing the
expressions themselves, and a tokenizer whose expressions are not in the table is refused.

Sources: the left side is what the named models' tokenizer.json says; the right side is the list of names and
expressions in llama.cpp's `src/llama-vocab.cpp` (release of llama-cpp-python 0.3.36), where the original
expression is usually quoted above the adapted one. Every row is tested by training a small tokenizer with it
and comparing the ids of 500 texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quant_grids.errors import FormatError, UnsupportedError

Step = tuple[str, ...]
"""One step of a pre-tokenizer in canonical form: its kind, then its settings."""

# "Isolated" is the behaviour of every regular-expression split below; it is part of the canonical form.
_ASCII_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_CASED = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
_UNCASED = r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASH_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LLAMA3_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
QWEN2_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_CASED}]*[{_UNCASED}]+|[^\r\n\p{{L}}\p{{N}}]?[{_CASED}]+[{_UNCASED}]*|\p{{N}}" + _SLASH_TAIL
)
GPT4O_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_CASED}]*[{_UNCASED}]+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_CASED}]+[{_UNCASED}]*{_CONTRACTIONS}?|\p{{N}}{{1,3}}" + _SLASH_TAIL
)
DEEPSEEK_CJK = "[一-龥ࠀ-一가-퟿]+"
# Letters with case (an explicit list of Unicode's L&), then ASCII, full-width and typographic punctuation.
DEEPSEEK_LETTERS = (
    r"\s?[A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
    "]+"
)
DEEPSEEK_PUNCTUATION = r"\s?" + "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
DEEPSEEK3_SPLIT = (
    _ASCII_PUNCTUATION + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Every character matches one of these, so keeping the matches and removing what is between them cuts as isolating
# does.
_COVERING = frozenset({LLAMA3_SPLIT, QWEN2_SPLIT, TEKKEN_SPLIT, GPT4O_SPLIT})

_GPT2: Step = ("bytes", "gpt2 words")
_BYTES: Step = ("bytes", "as they come")
_DIGITS: Step = ("digits", "one by one")


def _split(pattern: str) -> Step:
    return ("split", pattern, "Isolated")


@dataclass(frozen=True)
class PreTokenizer:
    """One row of the table.

    Attributes:
        name: llama.cpp's name.
        steps: The canonical steps of the tokenizer.json it stands for.
        ignore_merges: The tokenizer's `ignore_merges`: a word that is a token is taken whole, without
            merging.
        cleans_spaces: llama.cpp drops spaces before punctuation when it turns ids into text.
        models: Models whose tokenizer.json this is.
        limits: Where llama.cpp's expression is known to cut differently; shown as a warning.
    """

    name: str
    steps: tuple[Step, ...]
    ignore_merges: bool
    cleans_spaces: bool
    models: str
    limits: str = ""


_CASES = (
    "llama.cpp's expression for this pre-tokenizer knows upper case from lower case in ASCII only, and does not keep "
    "combining marks with their letters: text in scripts such as Devanagari or Thai is tokenized differently."
)

TABLE: tuple[PreTokenizer, ...] = (
    PreTokenizer("llama-bpe", (_split(LLAMA3_SPLIT), _BYTES), True, True, "Llama 3, 3.1, 3.2, 3.3; SmolLM3"),
    PreTokenizer("dbrx", (_split(LLAMA3_SPLIT), _BYTES), False, True, "OpenAI's cl100k words: Phi-4"),
    PreTokenizer("qwen2", (_split(QWEN2_SPLIT), _BYTES), False, False, "Qwen2, Qwen2.5, Qwen3"),
    PreTokenizer("stablelm2", (_split(QWEN2_SPLIT), _BYTES), False, True, "StableLM 2"),
    PreTokenizer("gpt-2", (_GPT2,), False, True, "GPT-2, Phi-2"),
    PreTokenizer("trillion", (_GPT2,), False, False, "GPT-2's words, spaces left alone"),
    PreTokenizer("smollm", (_DIGITS, _GPT2), False, False, "SmolLM, SmolLM2"),
    PreTokenizer("starcoder", (_DIGITS, _GPT2), False, True, "StarCoder, StarCoder2"),
    PreTokenizer("tekken", (_split(TEKKEN_SPLIT), _BYTES), True, False, "Mistral Nemo and later", _CASES),
    PreTokenizer("gpt-4o", (_split(GPT4O_SPLIT), _BYTES), False, False, "OpenAI's o200k words: Phi-4-mini", _CASES),
    PreTokenizer(
        "deepseek-coder",
        (_split(r"[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _split(DEEPSEEK_CJK), _DIGITS, _BYTES),
        False,
        False,
        "DeepSeek-Coder",
    ),
    PreTokenizer(
        "deepseek-llm",
        (
            _split(r"[\r\n]"),
            _split(DEEPSEEK_LETTERS),
            _split(DEEPSEEK_PUNCTUATION),
            _split(r"\s+$"),
            _split(DEEPSEEK_CJK),
            # llama.cpp keeps runs of digits together here, which is the same as long as no merge joins digits; a
            # tokenizer that was trained on single digits has none.
            _DIGITS,
            _BYTES,
        ),
        False,
        False,
        "DeepSeek LLM, DeepSeek-Coder 7B v1.5",
    ),
    PreTokenizer(
        "deepseek-v3",
        (_split(r"\p{N}{1,3}"), _split("[一-龥぀-ゟ゠-ヿ]+"), _split(DEEPSEEK3_SPLIT), _BYTES),
        False,
        False,
        "DeepSeek-V3 and R1 distillations with its tokenizer",
    ),
)


def names() -> tuple[str, ...]:
    """The pre-tokenizer names in the table, for help texts."""
    return tuple(row.name for row in TABLE)


def limits_of(name: str) -> list[str]:
    """The known limits of a pre-tokenizer, as warnings."""
    return [row.limits for row in TABLE if row.name == name and row.limits]


def recognise(pre_tokenizer: Any, *, ignore_merges: bool, cleans_spaces: bool | None) -> str:
    """Finds llama.cpp's name for the `pre_tokenizer` of a tokenizer.json.

    Where llama.cpp has the same expressions under two names that differ only in how ids are turned back into
    text, `cleans_spaces` (tokenizer_config.json's `clean_up_tokenization_spaces`) decides.

    Raises:
        FormatError: The object is malformed.
        UnsupportedError: No row of the table has these steps.
    """
    steps = tuple(_steps(pre_tokenizer))
    rows = [row for row in TABLE if row.steps == steps and row.ignore_merges == ignore_merges]
    for row in rows:
        if cleans_spaces is None or row.cleans_spaces == cleans_spaces:
            return row.name
    if rows:
        return rows[0].name
    raise UnsupportedError(
        f"The tokenizer's pre-tokenizer is not one this converter recognises ({_summary(steps, ignore_merges)}); "
        "name llama.cpp's with --pre NAME if you know it, or make the base with llama.cpp's own converter: "
        "--converter PATH/convert_hf_to_gguf.py."
    )


def _steps(node: Any) -> Iterator[Step]:
    """Flattens nested sequences into canonical steps, dropping settings that do not change where text is cut."""
    if node is None:
        return
    if not isinstance(node, Mapping) or not isinstance(node.get("type"), str):
        raise FormatError(f"tokenizer.json: a pre-tokenizer has no type: {node!r:.120}.")
    kind = node["type"]
    if kind == "Sequence":
        children = node.get("pretokenizers")
        if not isinstance(children, list) or len(children) > 64:
            raise FormatError("tokenizer.json: a pre-tokenizer sequence has no list of pre-tokenizers.")
        for child in children:
            yield from _steps(child)
    elif kind == "ByteLevel":
        if node.get("add_prefix_space") is True:
            yield ("prefix space",)
        yield _GPT2 if node.get("use_regex", True) else _BYTES
    elif kind == "Digits":
        yield _DIGITS if node.get("individual_digits") is True else ("digits", "runs")
    elif kind == "Split":
        yield _split_step(node)
    else:
        yield (kind,)


def _split_step(node: Mapping[str, Any]) -> Step:
    pattern = node.get("pattern")
    if not isinstance(pattern, Mapping) or len(pattern) != 1:
        raise FormatError(f"tokenizer.json: a split has no pattern: {node!r:.120}.")
    ((kind, text),) = pattern.items()
    # Some files hold line breaks as characters, some as escapes; to the expression they are the same.
    escaped = str(text).replace("\r", r"\r").replace("\n", r"\n")
    behaviour = "inverted " * (node.get("invert") is True) + str(node.get("behavior"))
    if behaviour == "inverted Removed" and escaped in _COVERING:
        behaviour = "Isolated"
    return ("split" if kind == "Regex" else "literal split", escaped, behaviour)


def _summary(steps: tuple[Step, ...], ignore_merges: bool) -> str:
    shown = "; ".join(" ".join(step) for step in steps) or "none"
    return f"{shown:.200}{', ignore_merges' if ignore_merges else ''}"
