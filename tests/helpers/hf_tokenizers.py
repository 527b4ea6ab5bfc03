"""Small tokenizers trained on a few kilobytes of mixed text, and the texts they are compared on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ("<|begin|>", "<|im_end|>", "<|im_start|>")


def train_byte_bpe(
    pre_tokenizer: Any, *, vocabulary: int = 384, ignore_merges: bool = False, special: tuple[str, ...] = ()
) -> Tokenizer:
    """A byte-level BPE tokenizer with three special tokens at ids 0, 1, 2, and those of `special` behind them."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, add_bos: bool = False, **settings: Any) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings}))


def digits_then_bytes() -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def splits(*patterns: str, digits: bool = False) -> Any:
    """Regular-expression splits followed by the byte alphabet."""
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    if digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


CODE = (
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "for (int i = 0; i < 1024; ++i) {\n\tsum += values[i] * 0x1F;\n}\n",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;\r\n",
    "const f = async (x) => { await fetch(`https://example.org/${x}?q=1`); };",
    'print("Hello, world!", end="")  # a comment\n',
    "git commit -m 'fix: don\\'t crash' && git push --force-with-lease",
)
PROSE = (
    "I'm sure you've seen that they're here; we'd say it's what he'll do, and I'LL SHOUT: DON'T!",
    "The year 2024 had 366 days, 8784 hours and 527040 minutes. Price: $1,234.56 (approx. 12%).",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Façade, naïve, Ångström.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ελληνικά γράμματα και τόνοι.",
    "今日は良い天気ですね。東京タワーに行きましょう！ 中文字符测试，包括标点。 한국어 문장도 있습니다.",
    "مرحبا بالعالم، كيف حالك؟ שלום עולם. नमस्ते दुनिया। สวัสดีชาวโลก",
    "emoji 😀😃 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ✅ ⚠️ 🤷🏽‍♀️ and math ∑∫√∞ ≤≥≠ ½ ¾ ² ³ Ⅷ ①",
    "tabs\tand\t\tdouble  spaces   triple    four\n\n\nnewlines \n mixed \r\n ends  ",
)


def corpus() -> list[str]:
    """Training text."""
    return [text for text in (*CODE, *PROSE) for _ in range(4)]


def texts(count: int = 500, seed: int = 7) -> list[str]:
    """`count` texts: the corpus lines, edge cases, and random mixtures of fragments.

    Everything is in Unicode normal form C, as a tokenizer with an NFC normaliser would leave it: llama.cpp
    does not normalise.
    """
    edge = [
        "", " ", "  ", "   ", "\n", "\n\n", " \n", "\t", "\r\n", "a", " a", "a ", "  a  b  ", "0", "00", "000", "0000",
        "12345678901234567890", "3.14159", "1,000,000", "x1y22z333", "'s", "'S", "'ll'LL", "don't", "DON'T", "ain't've",
        "a\u0301 e\u0301 combining", "n\u0303o\u0308", "क्षि त्रि", "กำลัง", "\u200b\u200d", "\ufeff", "\u00a0nbsp\u00a0",
        "\u3000wide\u3000",
        "<|im_start|>user\nhi<|im_end|>\n", "a<|im_end|>b", " <|begin|> ", "<|im_end|><|im_end|>",
        "<|not_a_token|>", "<|im_", "….!?", "---", "===>", "::", "(){}[]", "\\n", "/usr/bin", "C:\\dir", "_under_score_",
        "CamelCaseWord", "ALLCAPS",
        "mixedCASE123abc", "ﬁ ligature", "Ⅳ²³½", "🤷🏽‍♀️", "👨‍👩‍👧", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\u0000", "\u007f",
    ]  # fmt: skip
    source = random.Random(seed)
    fragments = [word for text in (*CODE, *PROSE) for word in text.split(" ")]
    fragments += [
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        " ",
        "",
        "7",
        "42",
        "1999",
        "😀",
        "é",
        "ü",
        "中",
        "日本",
        "<|im_end|>",
    ]
    made = [*CODE, *PROSE, *edge]
    while len(made) < count:
        words = source.choices(fragments, k=source.randint(1, 12))
        made.append(source.choice((" ", "", " ", "\n")).join(words))
    return made[:count]


__all__ = ["AddedToken", "Tokenizer", "corpus", "save_tokenizer", "splits", "texts", "tokenizers", "train_byte_bpe"]
