"""Which suites and prompts a model can be asked: no tools without a template for them, no prompt beyond its context."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qguard_edge.verify.chat import ChatTemplate, render, takes_tools
from qguard_edge.verify.files import PairError
from qguard_edge.verify.subjects import Subject
from qguard_edge.verify.suites.base import PromptSource, Suite, SuiteError, SuitePrompt

TEMPLATE_BYTES = 1500
"""What a chat template may add to a prompt that is let through without being counted in tokens."""
BLOCK = 64
"""Prompts of a source that are looked at together."""


def askable(suites: Sequence[Suite], base: Subject) -> tuple[tuple[Suite, ...], list[str]]:
    """The suites without what the model cannot be asked, and the reasons, one sentence each.

    Raises:
        SuiteError: nothing is left of a suite that is not optional.
    """
    template = base.template()
    kept, reasons = [], []
    for suite in suites:
        if any(prompt.tools for prompt in suite.prompts) and (template is None or not takes_tools(template)):
            why = f"the suite {suite.name} is skipped: the base's chat template has no place for tools"
            if not suite.optional:
                raise SuiteError(f"{why}; take its tools out, or leave the suite out")
            reasons.append(why)
            continue
        room = _Room(base, template, suite.new_tokens)
        prompts = room.fitting(suite.prompts)
        limit = f"the model's context of {base.context_length} tokens"
        if not prompts:
            why = f"the suite {suite.name} is skipped: none of its prompts, with {suite.new_tokens} new tokens, fits {limit}"
            if not suite.optional:
                raise SuiteError(why)
            reasons.append(why)
            continue
        if len(prompts) < len(suite.prompts):
            left_out = len(suite.prompts) - len(prompts)
            reasons.append(
                f"{left_out} of {len(suite.prompts)} prompts of the suite {suite.name} are left out: they do not fit {limit}"
            )
        source = FittingPrompts(suite.source, room) if suite.source is not None else None
        kept.append(replace(suite, prompts=prompts, source=source))
    return tuple(kept), reasons


def check_base(base: Subject, *, allow_quantized: bool) -> list[str]:
    """Refuse a base that is quantized: what is wrong in it would be right in the candidate.

    Returns:
        A warning if it is one and is allowed.

    Raises:
        PairError: it is one, and is not allowed.
    """
    if not base.quantized:
        return []
    if not allow_quantized:
        raise PairError(
            f"the base {base.path.name} is quantized; give the full-precision model, or --allow-quantized-base to compare all "
            "the same"
        )
    return [
        f"the base {base.path.name} is quantized itself: what quantization woke in it is not found (--allow-quantized-base)"
    ]


@dataclass(frozen=True)
class _Room:
    """What fits the context of a model."""

    base: Subject
    template: ChatTemplate | None
    new_tokens: int

    def fitting(self, prompts: Sequence[SuitePrompt]) -> tuple[SuitePrompt, ...]:
        """The prompts that fit, in their order. No token is shorter than a byte, so short prompts need not be counted."""
        limit = self.base.context_length - self.new_tokens
        long = [prompt for prompt in prompts if _bytes(prompt) + TEMPLATE_BYTES > limit]
        if not long:
            return tuple(prompts)
        chats = [prompt for prompt in long if not prompt.completion]
        texts = {prompt.id: prompt.text for prompt in long}
        if self.template is not None and chats:
            texts |= dict(zip((prompt.id for prompt in chats), render(self.template, chats), strict=True))
        with self.base.vocabulary() as vocabulary:
            too_long = {name for name, text in texts.items() if len(vocabulary.tokenize(text)) + 1 > limit}
        return tuple(prompt for prompt in prompts if prompt.id not in too_long)


@dataclass(frozen=True)
class FittingPrompts:
    """The prompts of a source that fit a model; a `PromptSource`.

    Attributes:
        source: of all prompts.
        room: of the model.
    """

    source: PromptSource
    room: _Room

    def prompts(self, start: int, stop: int) -> tuple[SuitePrompt, ...]:
        """See `PromptSource.prompts`."""
        found: list[SuitePrompt] = []
        at = 0
        while len(found) < stop and (block := self.source.prompts(at, at + BLOCK)):
            found += self.room.fitting(block)
            at += BLOCK
        return tuple(found[start:stop])


def _bytes(prompt: SuitePrompt) -> int:
    parts = [prompt.text, prompt.system or "", *prompt.tools, *(content for _, content in prompt.turns)]
    return sum(len(part.encode()) + 40 for part in parts)
