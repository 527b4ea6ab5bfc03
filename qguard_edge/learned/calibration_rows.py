"""Calibration text as token ids: with a folder's tokenizer, or with a GGUF alone.

A GGUF carries its vocabulary and its chat template, so nothing else is needed: llama.cpp loads the vocabulary without the
weights. A folder has its tokenizer in transformers. In both cases the template is rendered in the same sandbox, where it is the
same day every day (`qguard_edge.verify.chat`), so both give the same rows wherever the tokenizers agree.

A template may refuse a system message: then it goes in front of the first question. If it refuses even that, the shipped
text goes in as plain text, and a warning says so; with the user's own text alone it is an error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from convert.gguf_file import GgufFile
from qguard_edge.learned.calibration import (
    Calibration,
    CalibrationError,
    CalibrationOptions,
    Document,
    chosen_documents,
    collect,
)
from qguard_edge.learned.calibration_packing import pack
from qguard_edge.runtimes.hf import HfModel, HfTokenizer
from qguard_edge.runtimes.llama import LlamaModel
from qguard_edge.verify.chat import ChatTemplate, TemplateError, render_conversations, template_of
from qguard_edge.verify.subjects import TextTokenizer

REFUSED = "the model's chat template takes no conversation, so the calibration text went in without it"
AHEAD = 64  # conversations per rendering: most runs need a part of the text


def hf_calibration(model: HfModel, options: CalibrationOptions, seed: int) -> Calibration:
    """The calibration samples of a folder's tokenizer; not self-written ones.

    Raises:
        CalibrationError: no usable text.
        TemplateError: the chat template refuses a conversation of the user's own text.
    """
    tokenizer = HfTokenizer(model.tokenizer)
    template = None
    if model.template_key:
        template = ChatTemplate(str(model.tokenizer.get_chat_template()), tokenizer.begin, tokenizer.end)
    begin = model.tokenizer.bos_token_id
    return _calibration(Texts(tokenizer, template, begin, strict=not options.packed), options, seed)


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
        return _calibration(_gguf_texts(path, vocabulary, strict=not options.packed), options, seed)


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


def _gguf_texts(path: Path, vocabulary: LlamaModel, *, strict: bool) -> "Texts":
    file = GgufFile(path)
    return Texts(vocabulary, template_of(file), file.get("tokenizer.ggml.bos_token_id"), strict=strict)


def _calibration(texts: "Texts", options: CalibrationOptions, seed: int) -> Calibration:
    found = collect(texts.of(chosen_documents(options, seed)), options, texts.start)
    return replace(found, warnings=(*found.warnings, *texts.warnings))


class Texts:
    """Renders and tokenizes; conversations many at a time, so one that the template refuses decides for all.

    Args:
        vocabulary: of the model.
        template: its chat template; None: contents go in as plain text.
        begin: id of its begin token, or None.
        strict: a template that refuses a conversation is an error.

    Attributes:
        start: the begin token, where the tokenizer puts one in front of plain text; else empty.
        warnings: one sentence each; complete once the texts have been taken.
    """

    def __init__(self, vocabulary: TextTokenizer, template: ChatTemplate | None, begin: int | None, *, strict: bool) -> None:
        self._vocabulary, self._template, self._strict = vocabulary, template, strict
        first = vocabulary.tokenize("", add_special=True)[:1]
        self.start = first if first == [begin] else []
        self.warnings: tuple[str, ...] = ()

    def of(self, documents: Sequence[Document]) -> Iterator[tuple[str, list[int]]]:
        """(text, token ids) of every document.

        Raises:
            TemplateError: the template refuses a conversation, and `strict`.
        """
        for first in range(0, len(documents), AHEAD):
            part = documents[first : first + AHEAD]
            rendered = iter(self._rendered([document for document in part if document.messages]))
            for document in part:
                if document.messages and self._template:
                    text = next(rendered)
                    ids = self._vocabulary.tokenize(text)
                    # The template may have written the begin token itself.
                    yield text, ids if ids[: len(self.start)] == self.start else self.start + ids
                else:
                    yield document.plain, self._vocabulary.tokenize(document.plain, add_special=True)

    def _rendered(self, conversations: Sequence[Document]) -> list[str]:
        """Texts by the template; nothing, and no template any more, where it refuses them."""
        if self._template is None or not conversations:
            return []
        try:
            return render_conversations(self._template, [document.messages for document in conversations])
        except TemplateError:
            pass
        try:
            return render_conversations(self._template, [document.folded.messages for document in conversations])
        except TemplateError as error:
            if self._strict:
                raise
            self._template, self.warnings = None, (f"{REFUSED}: {error}",)
            return []
