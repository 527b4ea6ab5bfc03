"""SentencePiece models trained on the text of `hf_tokenizers`, as tokenizer.model and as the tokenizer.json made of one."""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from convert.hf.tokenizer.spm_model import parse_spm_model
from tests.helpers.hf_tokenizers import corpus

SPACE = "\u2581"
CONTROL = ("<s>", "</s>", "<unk>")


def train_sentencepiece(kind: str, **options: Any) -> bytes:
    """A SentencePiece model of the kind (bpe, unigram), without normalisation unless asked for."""
    model = io.BytesIO()
    defaults: dict[str, Any] = {
        "vocab_size": 600,
        "byte_fallback": kind == "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "character_coverage": 0.98,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus() * 3), model_writer=model, model_type=kind, **{**defaults, **options}
    )
    return model.getvalue()


def to_json(raw: bytes, folder: Path, *, metaspace: bool = False, prefix: bool = True) -> Tokenizer:
    """The tokenizer.json that transformers makes of a SentencePiece BPE model: every split of a piece is a merge."""
    spm = parse_spm_model(raw)
    vocab = {piece.text: i for i, piece in enumerate(spm.pieces)}
    merges = []
    for piece in sorted(spm.pieces, key=lambda piece: -piece.score):
        if piece.type == 1:
            pairs = [(piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text))]
            known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
            merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        prepend = [normalizers.Prepend(SPACE)] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    tokenizer.add_special_tokens(list(CONTROL))
    finish(tokenizer, folder)
    return tokenizer


def finish(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
