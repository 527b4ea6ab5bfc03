"""The protocol between the verifier and whatever runs a model.

Input and output are token ids, and for texts the next-token distributions. llama.cpp on a GGUF is one runner, a folder in
transformers (`qguard_edge.runtimes.hf_runner`) is the other. With both, all models of a comparison get the same ids.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qguard_edge.runtimes.batching import Answer, Sampling
from qguard_edge.runtimes.llama import LlamaModel

FloatArray = npt.NDArray[np.float32]


class Runner(Protocol):
    """A loaded model."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n_new: int,
        *,
        sampling: Sampling,
        first_index: int = 0,
    ) -> list[Answer]:
        """Answer prompts given as token ids; see `qguard_edge.runtimes.batching.generate`."""

    def resize(self, *, n_ctx: int, n_seq: int) -> bool:
        """Hold `n_seq` sequences of `n_ctx` tokens from now on; False: it cannot, and must be opened anew."""

    def logits_chunks(self, tokens: Sequence[int]) -> Iterator[FloatArray]:
        """Next-token logits f32 `[<= chunk, n_vocab]` after every position of one text, chunk by chunk.

        Each array is valid until the next one is taken.
        """


class RunnerFactory(Protocol):
    """Loads models the same way each time."""

    def open(
        self, path: Path, *, n_ctx: int, n_seq: int = 1, n_batch: int = 2048, role: str = "candidate"
    ) -> AbstractContextManager[Runner]:
        """Load a model with `n_seq` sequences of `n_ctx` tokens, at most `n_batch` tokens per call.

        `role` (candidate, base, plain) matters where full-precision models are rounded while they are loaded.
        """

    def describe(self) -> dict[str, Any]:
        """What about it decides the numbers; part of the report and of the key under which answers are kept."""


LONG_CONTEXT = 1024
MOST_TOKENS = 16 * LONG_CONTEXT
"""Tokens that all sequences side by side may hold where one holds more than `LONG_CONTEXT`: the cache is allocated for all."""


SIDE_BY_SIDE, FEWER = 64, 32
CACHES = 1 << 30
USUAL_CONTEXT = 512
"""Tokens of a prompt and its answer up to which all are answered together; those of the default suites are."""


def parallel_for(token_bytes: int) -> int:
    """How many sequences are decoded side by side unless the user says it.

    A step with 64 rows makes a sixth more tokens per processor second than one with 32 (docs/benchmarks-verify.md); where the
    caches of 64 would take more than `CACHES`, that is not worth the memory.

    Args:
        token_bytes: of keys and values, for one token; 0: unknown.
    """
    return SIDE_BY_SIDE if 0 < token_bytes * USUAL_CONTEXT * SIDE_BY_SIDE <= CACHES else FEWER


def sequences(n_ctx: int, wanted: int) -> int:
    """How many sequences of `n_ctx` tokens are decoded side by side, so that long prompts do not multiply the memory."""
    return wanted if n_ctx <= LONG_CONTEXT else max(1, min(wanted, MOST_TOKENS // n_ctx))


def most_tokens(wanted: int) -> int:
    """Tokens that all sequences together hold at most, whatever the lengths of the prompts (short of one above `MOST_TOKENS`)."""
    return max(wanted * LONG_CONTEXT, MOST_TOKENS)


@dataclass(frozen=True)
class LlamaFactory:
    """How llama.cpp loads models, each in a process of its own; a `RunnerFactory`.

    Attributes:
        threads: 0 for all cores.
        n_gpu_layers: layers on the GPU; -1 for all.
        extra_buffers: repacked weights, see `qguard_edge.runtimes.llama.safe_extra_buffers`.
    """

    threads: int = 0
    n_gpu_layers: int = 0
    extra_buffers: bool = False

    def open(self, path: Path, *, n_ctx: int, n_seq: int = 1, n_batch: int = 2048, role: str = "candidate") -> LlamaModel:
        """See `RunnerFactory.open`."""
        return LlamaModel(
            path,
            n_ctx=n_ctx,
            n_threads=self.threads or None,
            n_seq=sequences(n_ctx, n_seq),
            n_gpu_layers=self.n_gpu_layers,
            n_batch=n_batch,
            extra_buffers=self.extra_buffers,
            most_tokens=most_tokens(n_seq) if n_seq > 1 else 0,
        )

    def describe(self) -> dict[str, Any]:
        """See `RunnerFactory.describe`."""
        return {
            "threads": self.threads,
            "n_gpu_layers": self.n_gpu_layers,
            "use_extra_bufts": self.extra_buffers,
            "kv_unified": False,
        }
