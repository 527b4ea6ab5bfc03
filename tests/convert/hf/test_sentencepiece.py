"""SentencePiece: tokenizer.model and tokenizer.json, BPE and unigram, give llama.cpp the same ids as the original."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from convert.hf.tokenizer import Tokenizer as Made
from convert.hf.tokenizer.spm_model import BPE, UNIGRAM, parse_spm_model
from quant_grids.errors import FormatError, UnsupportedError
from tests.helpers.hf_sentencepiece import CONTROL, SPACE, finish, to_json, train_sentencepiece
from tests.helpers.hf_tokenizers import texts
from tests.helpers.hf_vocab import load_vocab, vocab_gguf


@pytest.fixture(scope="module")
def bpe_model() -> bytes:
    return train_sentencepiece("bpe")


@pytest.fixture(scope="module")
def unigram_model() -> bytes:
    return train_sentencepiece("unigram")


def save_spm(raw: bytes, folder: Path, **settings: Any) -> sentencepiece.SentencePieceProcessor:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(raw)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return sentencepiece.SentencePieceProcessor(model_proto=raw)


def worse(folder: Path, made: Made, theirs: sentencepiece.SentencePieceProcessor, chosen: list[str]) -> list[str]:
    """Texts that llama.cpp segments into pieces of a lower total score than sentencepiece does.

    sentencepiece adds scores in single precision and llama.cpp in double, so of two segmentations that are equally
    good they may pick different ones.
    """
    with load_vocab(folder / "v.gguf") as llama:
        return [
            text
            for text in chosen
            if (ours := llama.tokenize(text, parse_special=False)) != (reference := theirs.encode(text))
            and abs(sum(map(theirs.get_score, ours)) - sum(map(theirs.get_score, reference))) > 1e-4
        ]


def differing(folder: Path, made: Made, reference: Callable[[str], list[int]], chosen: list[str]) -> list[str]:
    assert len(made.vocabulary.tokens) == len(made.vocabulary.types)
    with load_vocab(folder / "v.gguf") as llama:
        return [text for text in chosen if llama.tokenize(text, parse_special=False) != reference(text)]


# sentencepiece ends a text at a NUL, which tokenizer.model users never meet; llama.cpp goes on.
TEXTS = [text for text in texts() if "\0" not in text]


def test_wire_format_reader_agrees_with_sentencepiece(bpe_model: bytes, unigram_model: bytes) -> None:
    for raw, kind in ((bpe_model, BPE), (unigram_model, UNIGRAM)):
        ours, theirs = parse_spm_model(raw), sentencepiece.SentencePieceProcessor(model_proto=raw)
        assert ours.kind == kind
        assert [piece.text for piece in ours.pieces] == [theirs.id_to_piece(i) for i in range(len(theirs))]
        assert [piece.score for piece in ours.pieces] == [theirs.get_score(i) for i in range(len(theirs))]
        assert [piece.type == 6 for piece in ours.pieces] == [theirs.is_byte(i) for i in range(len(theirs))]
        assert [piece.type == 3 for piece in ours.pieces] == [theirs.is_control(i) for i in range(len(theirs))]
        assert (ours.roles["unk"], ours.roles["bos"], ours.roles["eos"]) == (
            theirs.unk_id(),
            theirs.bos_id(),
            theirs.eos_id(),
        )
        assert "pad" not in ours.roles


@pytest.mark.parametrize("prefix", [True, False])
def test_bpe_model_file(prefix: bool, tmp_path: Path) -> None:
    theirs = save_spm(train_sentencepiece("bpe", add_dummy_prefix=prefix), tmp_path)
    made = vocab_gguf(tmp_path, tmp_path / "v.gguf", len(theirs) + 8)
    assert (made.vocabulary.model, made.vocabulary.add_space_prefix) == ("llama", prefix)
    assert (made.special.add_bos, made.special.add_eos) == (True, False)
    assert made.special.ids["bos"] == theirs.bos_id()
    assert differing(tmp_path, made, theirs.encode, TEXTS) == []


def test_unigram_model_file(unigram_model: bytes, tmp_path: Path) -> None:
    theirs = save_spm(unigram_model, tmp_path)
    made = vocab_gguf(tmp_path, tmp_path / "v.gguf", len(theirs))
    assert made.vocabulary.model == "t5"
    # sentencepiece puts a space in front of the text it is given, llama.cpp in front of the first word: with spaces
    # at the start (or nothing but spaces) they come out differently.
    chosen = [text for text in TEXTS if text[:1] != " "]
    assert len(chosen) > 400
    assert worse(tmp_path, made, theirs, chosen) == []
    assert len(differing(tmp_path, made, theirs.encode, chosen)) < 10


def test_unigram_with_normalisation_table(tmp_path: Path) -> None:
    raw = train_sentencepiece("unigram", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    theirs = save_spm(raw, tmp_path)
    made = vocab_gguf(tmp_path, tmp_path / "v.gguf", len(theirs))
    assert made.vocabulary.charsmap
    assert made.vocabulary.remove_extra_whitespaces is True
    assert worse(tmp_path, made, theirs, TEXTS) == []
    assert len(differing(tmp_path, made, theirs.encode, TEXTS)) < 10


def test_user_defined_pieces(tmp_path: Path) -> None:
    # Without a space in front, as in Gemma's: otherwise llama.cpp puts one in front of each stretch of text between
    # such pieces, sentencepiece only in front of the whole.
    raw = train_sentencepiece("bpe", user_defined_symbols=["<tool>", SPACE * 2, "\n"], add_dummy_prefix=False)
    theirs = save_spm(raw, tmp_path)
    made = vocab_gguf(tmp_path, tmp_path / "v.gguf", len(theirs))
    kinds = dict(zip(made.vocabulary.tokens, made.vocabulary.types, strict=True))
    assert kinds["<tool>"] == kinds["  "] == kinds["\n"] == 4
    chosen = ["a<tool>b", "<tool><tool>", "x  y   z    .", "\n\n a\n", *TEXTS]
    assert differing(tmp_path, made, theirs.encode, chosen) == []


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("with_model_file", [True, False])
def test_bpe_json(prefix: bool, with_model_file: bool, bpe_model: bytes, tmp_path: Path) -> None:
    reference = to_json(bpe_model, tmp_path, prefix=prefix)
    if with_model_file:
        (tmp_path / "tokenizer.model").write_bytes(bpe_model)
    made = vocab_gguf(tmp_path, tmp_path / "v.gguf", reference.get_vocab_size())
    assert (made.vocabulary.model, made.vocabulary.add_space_prefix) == ("llama", prefix)
    assert (-1.0 in (made.vocabulary.scores or ())) or not with_model_file
    transformers_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with load_vocab(tmp_path / "v.gguf") as llama:
        wrong = [t for t in texts() if llama.tokenize(t) != transformers_tokenizer(t, add_special_tokens=False)["input_ids"]]
        assert wrong == []
        for text in ("", "a", "Hello <s> there", "x</s>y"):
            assert llama.tokenize(text, add_special=True) == transformers_tokenizer(text)["input_ids"]


def test_bpe_json_with_metaspace(bpe_model: bytes, tmp_path: Path) -> None:
    reference = to_json(bpe_model, tmp_path, metaspace=True)
    made = vocab_gguf(tmp_path, tmp_path / "v.gguf", reference.get_vocab_size())
    assert any("begins with one" in warning for warning in made.warnings)
    # Metaspace adds no space to a text that begins with one, nor to an empty one; llama.cpp adds it always.
    chosen = [text for text in texts() if text and not text.startswith((" ", SPACE))]
    with load_vocab(tmp_path / "v.gguf") as llama:
        assert [t for t in chosen if llama.tokenize(t) != reference.encode(t, add_special_tokens=False).ids] == []


def test_gemma_style_json(bpe_model: bytes, tmp_path: Path) -> None:
    reference = to_json(bpe_model, tmp_path, prefix=False)
    reference.normalizer = normalizers.Replace(" ", SPACE)
    reference.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    finish(reference, tmp_path)
    made = vocab_gguf(tmp_path, tmp_path / "v.gguf", reference.get_vocab_size())
    assert made.vocabulary.add_space_prefix is False
    with load_vocab(tmp_path / "v.gguf") as llama:
        assert [t for t in texts() if llama.tokenize(t) != reference.encode(t, add_special_tokens=False).ids] == []


@pytest.fixture
def unigram_json(unigram_model: bytes, tmp_path: Path) -> Tokenizer:
    spm = parse_spm_model(unigram_model)
    tokenizer = Tokenizer(models.Unigram([(piece.text, piece.score) for piece in spm.pieces], unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.add_special_tokens(list(CONTROL))
    finish(tokenizer, tmp_path)
    return tokenizer


def test_unigram_json(unigram_json: Tokenizer, tmp_path: Path) -> None:
    made = vocab_gguf(tmp_path, tmp_path / "v.gguf", unigram_json.get_vocab_size())
    assert made.vocabulary.model == "t5"
    assert (made.special.add_bos, made.special.add_eos) == (True, False)
    # As for the model file: texts that begin with a space. Texts with special tokens inside are left out too, because
    # llama.cpp then puts a space in front of each stretch of text between them.
    chosen = [text for text in texts() if text[:1] != " " and not any(token in text for token in CONTROL)]
    assert len(chosen) > 400
    with load_vocab(tmp_path / "v.gguf") as llama:
        assert [t for t in chosen if llama.tokenize(t) != unigram_json.encode(t, add_special_tokens=False).ids] == []


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["model"]["merges"].pop(3), "leave out 1 ways to build"),
        (lambda raw: raw["model"]["vocab"].pop("<0x00>"), "lacks 1 of the 256 byte tokens"),
        (lambda raw: raw.update(pre_tokenizer={"type": "Punctuation"}), "also cuts text with Punctuation"),
        (lambda raw: raw.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda raw: raw.update(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "b"}), "replaces"),
        (lambda raw: raw["model"].update(vocab={}), "cannot be loaded|no vocabulary"),
        (lambda raw: raw["model"]["vocab"].update(far=10**6), "go up to"),
        (lambda raw: raw["model"]["vocab"].update({"x" * 5_000_000: 3}), "a token of 5000000 characters"),
    ],
)
def test_what_scores_cannot_express_is_refused(change: Any, message: str, bpe_model: bytes, tmp_path: Path) -> None:
    rows = to_json(bpe_model, tmp_path).get_vocab_size()
    edit(tmp_path, change)
    with pytest.raises((UnsupportedError, FormatError), match=message):
        vocab_gguf(tmp_path, tmp_path / "v.gguf", rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["model"].update(unk_id=None), "no unknown token"),
        (lambda raw: raw["model"].update(vocab=[["a"]]), "not a unigram token"),
        (lambda raw: raw["model"].update(vocab=[["a", "b"]]), "no score"),
        (lambda raw: raw["model"].update(vocab=[]), "no vocabulary"),
        (lambda raw: raw["model"]["vocab"].__setitem__(9, ["x", float("nan")]), "finite"),
        (lambda raw: raw.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "!"}), "base64"),
        (
            lambda raw: raw.update(
                normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 8).decode()}
            ),
            "shorter than it says",
        ),
    ],
)
def test_malformed_unigram_json(change: Any, message: str, unigram_json: Tokenizer, tmp_path: Path) -> None:
    rows = unigram_json.get_vocab_size()
    edit(tmp_path, change)
    with pytest.raises((UnsupportedError, FormatError), match=message):
        vocab_gguf(tmp_path, tmp_path / "v.gguf", rows)


def test_byte_fallback_of_unigram_is_reported(unigram_json: Tokenizer, tmp_path: Path) -> None:
    edit(tmp_path, lambda raw: raw["model"].update(byte_fallback=True))
    made = vocab_gguf(tmp_path, tmp_path / "v.gguf", unigram_json.get_vocab_size())
    assert any("no byte fallback" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a piece of 2**63 bytes
        b"\x0a" + b"\x80" * 20,  # a length that never ends
        b"\x0a\x05\x0a\x03abc"[:-1],  # cut off
        b"\x0b",  # a group, which the format no longer has
        b"\x0a\x03\x0a\x01\xff",  # a piece that is not UTF-8
        b"\x0a\x02\x10\x01",  # a score that is an integer
        b"not a model at all",
    ],
)
def test_hostile_model_files(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(FormatError, match=r"tokenizer\.model"):
        vocab_gguf(tmp_path, tmp_path / "v.gguf", 64)


def test_model_file_larger_than_the_embedding(bpe_model: bytes, tmp_path: Path) -> None:
    save_spm(bpe_model, tmp_path)
    with pytest.raises(FormatError, match="beyond the 64 rows"):
        vocab_gguf(tmp_path, tmp_path / "v.gguf", 64)


def test_added_tokens_of_a_folder_without_tokenizer_json(bpe_model: bytes, tmp_path: Path) -> None:
    size = len(sentencepiece.SentencePieceProcessor(model_proto=bpe_model))
    save_spm(
        bpe_model,
        tmp_path,
        added_tokens_decoder={str(size): {"content": "<|end|>", "special": True}, "1": {"content": "<s>", "special": True}},
        bos_token="<s>",
        eos_token={"content": "<|end|>"},
    )
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<word>": size + 1}))
    made = vocab_gguf(tmp_path, tmp_path / "v.gguf", size + 4)
    assert made.vocabulary.tokens[size : size + 3] == ("<|end|>", "<word>", f"[PAD{size + 2}]")
    assert made.vocabulary.types[size : size + 3] == (3, 4, 5)
    assert made.special.ids["eos"] == made.special.ids["eot"] == size
    with load_vocab(tmp_path / "v.gguf") as llama:
        assert llama.tokenize("a<|end|>")[-1] == size


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="neither tokenizer"):
        vocab_gguf(tmp_path, tmp_path / "v.gguf", 64)


def test_regex_splits_are_refused(bpe_model: bytes, tmp_path: Path) -> None:
    tokenizer = to_json(bpe_model, tmp_path)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    finish(tokenizer, tmp_path)
    with pytest.raises(UnsupportedError, match="also cuts text with Split"):
        vocab_gguf(tmp_path, tmp_path / "v.gguf", tokenizer.get_vocab_size())


def test_tokens_across_words_need_unsplit_text(tmp_path: Path) -> None:
    tokenizer = to_json(train_sentencepiece("bpe", split_by_whitespace=False), tmp_path, metaspace=True)
    rows = tokenizer.get_vocab_size()
    vocab_gguf(tmp_path, tmp_path / "v.gguf", rows)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    finish(tokenizer, tmp_path)
    with pytest.raises(UnsupportedError, match="cuts text at spaces"):
        vocab_gguf(tmp_path, tmp_path / "v.gguf", rows)
