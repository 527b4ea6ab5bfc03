"""Calibration text as token ids, with a GGUF alone: it carries its vocabulary and its chat template.

llama.cpp loads the vocabulary without the weights.
"""

from collections.abc import Sequence
from pathlib import Path

from convert.gguf_file import GgufFile
from qguard_edge.learned.calibration import Calibration, CalibrationError, CalibrationOptions, Document
from qguard_edge.learned.calibration_packing import pack
from qguard_edge.learned.calibration_rows import Texts, calibration_of
from qguard_edge.runtimes.llama import LlamaModel
from qguard_edge.verify.chat import template_of


def gguf_calibration(path: Path, options: CalibrationOptions, seed: int) -> Calibration:
    """The calibration samples of a GGUF, without its weights.

    Args:
        path: of the GGUF (first shard of a split one).
        options: which text, and how much of it.
        seed: of the choice among more texts than are wanted.

    Raises:
        CalibrationError: no usable text, or self-written text, which needs transformers.
        TemplateError: the chat template refuses a conversation of the user's own text.
        LlamaRuntimeError: llama.cpp cannot load the vocabulary.
    """
    options.check()
    if options.self_written:
        raise CalibrationError("--calib self needs a model that transformers can run; a GGUF alone takes the mix or a file")
    with LlamaModel(path, vocab_only=True) as vocabulary:
        return calibration_of(_gguf_texts(path, vocabulary, strict=not options.packed), options, seed)


def token_rows(path: Path, documents: Sequence[Document], length: int, tokens: int) -> list[tuple[int, ...]]:
    """Documents as packed rows of token ids, with a GGUF's own vocabulary and chat template.

    Args:
        path: of the GGUF (first shard of a split one).
        documents: in order.
        length: ids of a row; the last one may be shorter.
        tokens: ids of all rows together at most.

    Raises:
        LlamaRuntimeError: llama.cpp cannot load the vocabulary.
    """
    with LlamaModel(path, vocab_only=True) as vocabulary:
        texts = _gguf_texts(path, vocabulary, strict=False)
        return list(pack((ids for _, ids in texts.of(documents)), length, tokens, texts.start))


def _gguf_texts(path: Path, vocabulary: LlamaModel, *, strict: bool) -> Texts:
    file = GgufFile(path)
    return Texts(vocabulary, template_of(file), file.get("tokenizer.ggml.bos_token_id"), strict=strict)
