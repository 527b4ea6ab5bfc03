"""Many answers at a time: continuous batching over independent sequences, one decode call per step.

llama.cpp reads every weight once per decode call, whether the call holds one token or thirty, so thirty sequences side
by side cost far less than thirty times one. The schedule:

1. There are `n_seq` slots. A free slot takes the next prompt at once (continuous refill), so that a long answer
   does not hold up short ones.
2. A slot has a queue of tokens to feed: the prompt at first, afterwards the one token that was chosen last. A step feeds
   what fits into a batch from every queue, prompts and answers together, and takes logits where a queue ran empty.
3. What all prompts begin with (a chat template's system message) is decoded once and copied to every slot; when an answer
   is done everything behind the shared prefix is removed from its slot.

The order in which prompts meet slots depends only on the prompts and answers, so the same file gives the same answers
again. Greedy unless a `Sampling` is given; then one uniform number per token, drawn from a generator seeded by (seed, index
of the answer), picks from the softmax. Two models thus meet the same numbers, which keeps them paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from quant_grids.errors import QGuardError

FloatArray = npt.NDArray[np.float32]
Row = tuple[int, int, int, bool]
"""Token, position, sequence, whether its logits are wanted."""


SCHEDULE = 3
"""Goes up when the order of decoding or the kind of attention changes, which moves last bits: answers that were kept by an older
schedule are not used."""


CIRCLE = 8
"""Tokens that are said again and again, at least, where an answer is ended for it."""


class Decoder(Protocol):
    """What the schedule needs of a model; `qguard_edge.runtimes.llama_native.NativeModel` has it."""

    n_ctx: int
    n_seq: int
    n_batch: int

    def decode(self, rows: Sequence[Row]) -> FloatArray:
        """Feed tokens; logits f32 `[wanted, n_vocab]` in row order, valid until the next call."""

    def keep(self, sequence: int, length: int) -> bool:
        """Remove what a sequence holds behind its first `length` tokens; False: the model can only be cleared as a whole."""

    def share(self, count: int) -> bool:
        """Copy what sequence 0 holds to sequences 1 to `count - 1`; False: the model cannot, nothing happened."""

    def reset(self) -> None:
        """Forget every sequence."""

    def is_end(self, token: int) -> bool:
        """Whether generation stops at this token."""


class PromptError(QGuardError):
    """A prompt is empty or does not fit the context."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: softmax temperature; 0 is greedy.
        seed: of the random numbers.
        stop_at_repeats: end an answer that goes round in circles, see `repeats`; greedy answers only.
    """

    temperature: float = 0.0
    seed: int = 0
    stop_at_repeats: bool = False


@dataclass(frozen=True)
class Answer:
    """The answer of one sequence.

    Attributes:
        tokens: new token ids, end token excluded.
        ended: the model ended the answer itself; False: it was cut.
    """

    tokens: tuple[int, ...]
    ended: bool


@dataclass
class _Slot:
    """One sequence at work."""

    index: int
    """Of the prompt."""
    queue: list[int]
    """Tokens to feed next."""
    position: int
    """Of the first of them."""
    answer: list[int] = field(default_factory=list)
    random: np.random.Generator | None = None


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    n_new: int,
    *,
    sampling: Sampling | None = None,
    first_index: int = 0,
) -> list[Answer]:
    """Answer many prompts.

    Args:
        model: whose sequences are reset first.
        prompts: token ids of each prompt, at least one.
        n_new: new tokens at most.
        sampling: None is greedy.
        first_index: index of the first prompt among all that share the seed.

    Returns:
        The answers in the order of the prompts.

    Raises:
        PromptError: a prompt is empty or too long for the context.
    """
    check_prompts(prompts, n_new, model.n_ctx)
    return _Schedule(model, prompts, n_new, sampling or Sampling(), first_index).run()


def repeats(answer: Sequence[int]) -> bool:
    """Whether an answer ends with the same tokens three times in a row, `CIRCLE` or more each time.

    A greedy model that has said the same three times hardly ever stops saying it, so the rest of the answer would tell nothing
    new. (A circle of fewer tokens is one of a multiple of them.)
    """
    for circle in range(CIRCLE, len(answer) // 3 + 1):
        last, rest = answer[-circle:], answer[-3 * circle : -circle]
        if rest[-1] == last[-1] and rest[:circle] == rest[circle:] == last:
            return True
    return False


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, leaving at least one of each; 0 for a single prompt."""
    if len(prompts) < 2:
        return 0
    limit = min(len(prompt) for prompt in prompts) - 1
    first = prompts[0]
    return next((i for i in range(limit) if any(prompt[i] != first[i] for prompt in prompts)), max(limit, 0))


def choose(logits: FloatArray, temperature: float, uniform: float) -> int:
    """The token at `uniform` (0..1) of the cumulated softmax of logits f32 `[n_vocab]`."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    cumulated = np.cumsum(weights)
    return min(int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right")), len(logits) - 1)


def check_prompts(prompts: Sequence[Sequence[int]], n_new: int, n_ctx: int) -> None:
    """Refuse prompts that cannot be answered.

    Raises:
        PromptError: one is empty, or too long for a context of `n_ctx` tokens with `n_new` new ones.
    """
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise PromptError(f"prompt {i + 1} has no token; a prompt needs at least one")
        if len(prompt) + n_new > n_ctx:
            raise PromptError(
                f"prompt {i + 1} has {len(prompt)} tokens; with {n_new} new ones it does not fit a context of {n_ctx}"
            )


class _Schedule:
    """The state of one `generate` call."""

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        n_new: int,
        sampling: Sampling,
        first_index: int,
    ) -> None:
        self.model, self.prompts, self.n_new = model, prompts, n_new
        self.sampling, self.first_index = sampling, first_index
        self.answers: list[Answer | None] = [None] * len(prompts)
        self.prefix = shared_prefix(prompts)
        self.kept = [0] * model.n_seq
        self.free = list(range(model.n_seq))
        self.active: dict[int, _Slot] = {}
        self.next = 0

    def run(self) -> list[Answer]:
        self.model.reset()
        self._share_prefix()
        while True:
            self._refill()
            if not self.active:
                return [answer for answer in self.answers if answer is not None]
            self._step()

    def _share_prefix(self) -> None:
        """Decode what all prompts begin with once, for every slot that will be used."""
        used = min(self.model.n_seq, len(self.prompts))
        if self.n_new == 0 or self.prefix == 0 or used < 2:
            return
        for start in range(0, self.prefix, self.model.n_batch):
            part = self.prompts[0][start : min(start + self.model.n_batch, self.prefix)]
            self.model.decode([(token, start + i, 0, False) for i, token in enumerate(part)])
        for slot in range(used if self.model.share(used) else 1):
            self.kept[slot] = self.prefix

    def _refill(self) -> None:
        while self.n_new > 0 and self.free and self.next < len(self.prompts):
            slot, index = self.free.pop(0), self.next
            self.next += 1
            random = None
            if self.sampling.temperature > 0:
                random = np.random.default_rng((self.sampling.seed, self.first_index + index))
            kept = self.kept[slot]
            self.active[slot] = _Slot(index, list(self.prompts[index][kept:]), kept, random=random)
        if self.n_new == 0:
            self.answers = [Answer((), ended=False) for _ in self.prompts]

    def _step(self) -> None:
        """Decode a batch, and choose the next token of every slot whose queue ran empty."""
        rows: list[Row] = []
        asked: list[int] = []
        for number, slot in self.active.items():
            room = self.model.n_batch - len(rows)
            fed, slot.queue = slot.queue[:room], slot.queue[room:]
            last = len(fed) - 1 if not slot.queue else -1
            rows += [(token, slot.position + i, number, i == last) for i, token in enumerate(fed)]
            slot.position += len(fed)
            if fed and not slot.queue:
                asked.append(number)
        logits = self.model.decode(rows)
        best = logits.argmax(-1) if self.sampling.temperature == 0 and asked else None
        for row, number in enumerate(asked):
            slot = self.active[number]
            if best is not None:
                token = int(best[row])
            else:
                assert slot.random is not None
                token = choose(logits[row], self.sampling.temperature, slot.random.random())
            self._said(number, slot, token)

    def _said(self, number: int, slot: _Slot, token: int) -> None:
        ended = self.model.is_end(token)
        if not ended:
            slot.answer.append(token)
            slot.queue = [token]
        circles = self.sampling.stop_at_repeats and slot.random is None and repeats(slot.answer)
        if ended or circles or len(slot.answer) == self.n_new:
            self.answers[slot.index] = Answer(tuple(slot.answer), ended)
            del self.active[number]
            self.free.append(number)
            self.kept[number] = self.prefix if self.model.keep(number, self.prefix) else 0
