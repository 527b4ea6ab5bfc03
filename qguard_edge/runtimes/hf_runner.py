"""A folder in transformers as a `Runner` (see `qguard_edge.verify.runner`): answers to token ids, and logits of texts.

Prompts of one batch are padded on the left, so that every row's next token is in the last column; the mask hides the padding
and positions are counted from each row's own first token, so a prompt in a batch is read as it is alone. Rows that have ended are
taken out of the batch and its cache when a quarter of them is done. The loop is ours, not `model.generate`: what a
folder's generation_config asks for (penalties, sampling) must not decide an answer that is compared token by token.

Everything runs in f32 on a CPU, where bf16 has few kernels and padding would move its last bits, and in the folder's own type
on a GPU. Two exceptions that no caller can switch off: bitsandbytes computes INT8 products in f16, and decides for a whole
batch which columns hold outliers, so there the company a prompt is in moves its logits a little.
"""

import inspect
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from qguard_edge.runtimes.batching import Answer, PromptError, Sampling, choose, repeats

FloatArray = npt.NDArray[np.float32]
KEEP_FULL = 0.75
"""A batch is made smaller when this share of its rows, or less, is still at work."""


class HfRunner:
    """A loaded model.

    Args:
        model: of transformers, in evaluation mode.
        ends: tokens that end an answer.
        pad: token to pad with; the mask hides it.
        n_ctx: tokens of a prompt and its answer at most.
        n_seq: prompts answered side by side.
        n_batch: positions of a text decoded at a time.
    """

    def __init__(self, model: Any, *, ends: frozenset[int], pad: int, n_ctx: int, n_seq: int, n_batch: int) -> None:
        self.model, self.ends, self.pad = model, ends, pad
        self.n_ctx, self.n_seq, self.n_batch = n_ctx, n_seq, n_batch
        takes = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._takes_positions = "position_ids" in takes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.model = None

    def resize(self, *, n_ctx: int, n_seq: int) -> bool:
        """See `Runner.resize`: nothing is allocated ahead."""
        self.n_ctx, self.n_seq = n_ctx, n_seq
        return True

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n_new: int,
        *,
        sampling: Sampling,
        first_index: int = 0,
    ) -> list[Answer]:
        """See `Runner.generate`.

        Raises:
            PromptError: a prompt is empty or too long for the context.
        """
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= self.n_ctx - n_new:
                raise PromptError(f"prompt {i + 1} has {len(prompt)} tokens; 1 to {self.n_ctx - n_new} fit this context")
        answers: list[Answer] = []
        for start in range(0, len(prompts), self.n_seq):
            part = prompts[start : start + self.n_seq]
            answers += (
                self._answer(part, n_new, sampling, first_index + start) if n_new else [Answer((), False) for _ in part]
            )
        return answers

    def logits_chunks(self, tokens: Sequence[int]) -> Iterator[FloatArray]:
        """See `Runner.logits_chunks`."""
        cache = None
        for start in range(0, len(tokens), self.n_batch):
            ids = torch.tensor([list(tokens[start : start + self.n_batch])], device=self.model.device)
            with torch.inference_mode():
                made = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = made.past_key_values
            yield made.logits[0].float().cpu().numpy()

    def _answer(self, prompts: Sequence[Sequence[int]], n_new: int, sampling: Sampling, first: int) -> list[Answer]:
        """Answers of one batch, the first of which has index `first` among all."""
        width, device = max(map(len, prompts)), self.model.device
        ids = torch.tensor([[self.pad] * (width - len(p)) + list(p) for p in prompts], device=device)  # [B, T]
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        randoms = [np.random.default_rng((sampling.seed, first + i)) for i in range(len(prompts))]
        answered: list[list[int]] = [[] for _ in prompts]
        ended, circling = [False] * len(prompts), [False] * len(prompts)
        watched = sampling.stop_at_repeats and sampling.temperature == 0
        rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
        cache = None
        while True:
            with torch.inference_mode():
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                place = {"position_ids": positions} if self._takes_positions else {}
                made = self.model(
                    input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **place, **self._last_only
                )
            cache = made.past_key_values
            tokens = self._chosen(made.logits[:, -1].float(), sampling, [randoms[row] for row in rows])
            for row, token in zip(rows, tokens, strict=True):
                if not ended[row] and not circling[row] and len(answered[row]) < n_new:
                    ended[row] = token in self.ends
                    answered[row] += [] if ended[row] else [token]
                    circling[row] = watched and repeats(answered[row])
            busy = [i for i, row in enumerate(rows) if not ended[row] and not circling[row] and len(answered[row]) < n_new]
            if not busy:
                return [Answer(tuple(tokens), end) for tokens, end in zip(answered, ended, strict=True)]
            if len(busy) <= KEEP_FULL * len(rows) and hasattr(cache, "batch_select_indices"):
                kept = torch.tensor(busy, device=device)
                cache.batch_select_indices(kept)
                mask, rows, tokens = mask[kept], [rows[i] for i in busy], [tokens[i] for i in busy]
            ids = torch.tensor(tokens, device=device)[:, None]  # [B, 1]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)

    def _chosen(self, logits: torch.Tensor, sampling: Sampling, randoms: Sequence[np.random.Generator]) -> list[int]:
        """The next token of every row, from logits f32 `[B, n_vocab]`."""
        if sampling.temperature == 0:
            return [int(token) for token in logits.argmax(-1).tolist()]
        rows = logits.cpu().numpy()
        return [choose(row, sampling.temperature, own.random()) for row, own in zip(rows, randoms, strict=True)]
