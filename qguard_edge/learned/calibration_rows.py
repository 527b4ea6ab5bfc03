"""Calibration text as token ids, with any tokenizer and chat template: a folder's, or a GGUF's (`calibration_gguf`).

The template is rendered in the verifier's sandbox, where it is the same day every day (`qguard_edge.verify.chat`), so a folder
and its GGUF give the same rows wherever their tokenizers agree. Nothing here needs llama.cpp.

A template may refuse a system message: then it goes in front of the first question. If it refuses even that, the shipped
text goes in as plain text, and a warning says so; with the user's own text alone it is an error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qguard_edge.learned.calibration import (
    Calibration,
    CalibrationOptions,
    Document,
    chosen_documents,
    collect,
)
from qguard_edge.runtimes.hf import HfModel, HfTokenizer
from qguard_edge.verify.chat import ChatTemplate, TemplateError, render_conversations

if TYPE_CHECKING:
    from qguard_edge.verify.subjects import TextTokenizer  # brings llama.cpp with it

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
    return calibration_of(Texts(tokenizer, template, begin, strict=not options.packed), options, seed)


def calibration_of(texts: "Texts", options: CalibrationOptions, seed: int) -> Calibration:
    """The calibration samples of a model, by its way from documents to token ids."""
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

    def __init__(
        self, vocabulary: "TextTokenizer", template: ChatTemplate | None, begin: int | None, *, strict: bool
    ) -> None:
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
