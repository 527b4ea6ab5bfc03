"""llama.cpp on a GGUF that nobody vouches for: load it, turn text into token ids, get logits, generate.

The model is loaded in a child process of its own (`llama_worker`, which runs `llama_native`) and stays open there: llama.cpp
aborts on many a broken file, and that ends the child, not the caller. The numbers are those of `NativeModel` in process, bit by
bit. What comes back is checked: sizes, token ids, counts.

llama.cpp's own log lines go to the logger `qguard_edge.llama_cpp` at DEBUG level; the last ones are quoted when a child dies.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import llama_cpp
import numpy as np
import numpy.typing as npt

from convert.cores import available_cores
from convert.llama_limits import ChildLimits, LlamaRuntimeError
from qguard_edge.runtimes.batching import Answer, Sampling, check_prompts
from qguard_edge.runtimes.llama_child import LlamaProcess

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
LARGEST_VOCABULARY = 1 << 22
LARGEST_TEXT = 1 << 28
"""Bytes of the text of one request's tokens."""


def system_info() -> str:
    """CPU features and build flags as llama.cpp reports them."""
    return str(llama_cpp.llama_print_system_info().decode())


def safe_extra_buffers() -> bool:
    """Whether repacked weights can be used: not with AMX, whose kernels crash for some types (llama.cpp#20824)."""
    return not re.search(r"AMX\w* = 1", system_info()) and "amx" not in _processor_flags()


def _processor_flags() -> str:
    """Linux' list of processor features; empty elsewhere, where llama.cpp has no AMX kernels either."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").partition("flags")[2].partition("\n")[0]
    except OSError:
        return ""


class LlamaModel:
    """A GGUF in a process of its own, with `n_seq` independent sequences.

    Use as a context manager; the process ends on exit.

    Args:
        path: the GGUF file (first shard of a split one).
        n_ctx: tokens each sequence can hold.
        n_threads: worker threads; default: all cores.
        n_seq: sequences decoded side by side.
        n_gpu_layers: layers to offload, 0 for none.
        vocab_only: load the tokenizer alone (no decoding).
        exact: see `NativeModel`.
        n_batch: tokens of one decode call at most; all their logits together take `4 * n_batch * n_vocab` bytes.
        extra_buffers: let llama.cpp repack weights for this processor; see `safe_extra_buffers`.
        most_tokens: of all sequences together, up to which `resize` can go; 0: `n_ctx * n_seq`.

    Raises:
        LlamaRuntimeError: llama.cpp could not load the file, or died of it.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 512,
        n_threads: int | None = None,
        n_seq: int = 1,
        n_gpu_layers: int = 0,
        vocab_only: bool = False,
        exact: bool = False,
        n_batch: int = 2048,
        extra_buffers: bool = False,
        most_tokens: int = 0,
    ) -> None:
        self.n_ctx, self.n_seq = n_ctx, n_seq
        self._name = Path(path).name
        threads = n_threads or available_cores()
        self._most, self._largest_batch = max(n_ctx * n_seq, most_tokens), n_batch
        tokens = 0 if vocab_only else self._most
        self._process = LlamaProcess(ChildLimits.of(Path(path), tokens=tokens, threads=threads))
        options = {
            "n_ctx": n_ctx, "n_threads": threads, "n_seq": n_seq, "n_gpu_layers": n_gpu_layers, "vocab_only": vocab_only,
            "exact": exact, "n_batch": n_batch, "extra_buffers": extra_buffers,
        }  # fmt: skip
        try:
            sizes = self._numbers({"do": "load", "path": str(path), **options}, "loading", most=2)
            if len(sizes) != 2 or not (0 <= sizes[0] <= LARGEST_VOCABULARY and 0 <= sizes[1] <= n_batch):
                raise LlamaRuntimeError(
                    f"{self._name}: a vocabulary of {sizes[:1].tolist()} tokens; the limit is {LARGEST_VOCABULARY}"
                )
        except BaseException:
            self.close()
            raise
        self.n_vocab, self.n_batch = int(sizes[0]), int(sizes[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def resize(self, *, n_ctx: int, n_seq: int) -> bool:
        """Another number of sequences and of tokens that each can hold; the weights stay, every sequence is forgotten.

        Returns:
            False, and nothing happens, when the process was not started for so many tokens.

        Raises:
            LlamaRuntimeError: llama.cpp cannot make such a context.
        """
        if n_ctx * n_seq > self._most:
            return False
        sizes = self._numbers({"do": "resize", "n_ctx": n_ctx, "n_seq": n_seq}, "making a context for", most=1)
        if len(sizes) != 1 or not 0 < sizes[0] <= self._largest_batch:
            raise self._nonsense()
        self.n_ctx, self.n_seq, self.n_batch = n_ctx, n_seq, int(sizes[0])
        return True

    def close(self) -> None:
        """End the process; safe to call twice."""
        self._process.close()

    def processor_seconds(self) -> float:
        """Processor time that the process has taken so far."""
        return float(np.frombuffer(self._process.ask({"do": "spent"}, "", most=8), "<f8")[0])

    # Tokenizer ------------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text`; `parse_special` reads `<|im_start|>` and the like as control tokens."""
        request = {"do": "tokenize", "text": text, "add_special": add_special, "parse_special": parse_special}
        ids = self._numbers(request, "tokenizing with", most=len(text.encode("utf-8")) + 8)
        self._check_ids(ids)
        return [int(n) for n in ids]

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of `tokens`; control tokens are written only with `special`."""
        return self.texts([tokens], special=special)[0]

    def texts(self, texts: Sequence[Sequence[int]], *, special: bool = False) -> list[str]:
        """Many texts at a time, see `detokenize`."""
        for tokens in texts:
            self._check_ids(np.asarray(tokens, np.int64))
        request = {"do": "detokenize", "texts": [[int(n) for n in tokens] for tokens in texts], "special": special}
        start = 8 * len(texts)
        reply = self._ask(request, "reading tokens of", most=start + LARGEST_TEXT)
        sizes = np.frombuffer(reply[:start], "<i8")
        if len(sizes) != len(texts) or sizes.min(initial=0) < 0 or start + sum(map(int, sizes)) != len(reply):
            raise self._nonsense()
        ends = np.cumsum(sizes) + start
        return [
            reply[end - size : end].decode("utf-8", "replace")
            for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)
        ]

    # Decoding -------------------------------------------------------------------------------------------------------

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        """Next-token logits after every position of one sequence: f32 `[n_tokens, n_vocab]`."""
        made = np.empty((len(tokens), self.n_vocab), np.float32)
        self._check_fits(len(tokens))
        for start in range(0, len(tokens), self.n_batch):
            self._decode(tokens[start : start + self.n_batch], start, made[start : start + self.n_batch])
        return made

    def logits_chunks(self, tokens: Sequence[int], chunk: int | None = None) -> Iterator[FloatArray]:
        """As `logits`, at most `chunk` (default: `n_batch`) positions at a time, so that memory stays bounded.

        Each array is valid until the next one is taken.
        """
        size = min(chunk or self.n_batch, self.n_batch)
        self._check_fits(len(tokens))
        space = np.empty((min(size, len(tokens)), self.n_vocab), np.float32)
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            self._decode(part, start, space[: len(part)])
            yield space[: len(part)]

    def _decode(self, tokens: Sequence[int], start: int, space: FloatArray) -> None:
        """Logits of tokens that follow the first `start` ones, into `space`."""
        request = {"do": "decode", "tokens": [int(n) for n in tokens], "start": start}
        self._process.ask_into(request, f"while running {self._name}", space.data.cast("B"))

    def greedy(self, tokens: Sequence[int], n: int) -> list[int]:
        """The `n` most likely next tokens, one after the other; stops early at an end token (which is not returned)."""
        return self.greedy_batch([tokens], n)[0]

    def greedy_batch(self, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
        """Greedy continuations of many prompts, `n_seq` of them in flight at a time; see `generate`."""
        return [list(answer.tokens) for answer in self.generate(prompts, n)]

    def generate(
        self, prompts: Sequence[Sequence[int]], n_new: int, *, sampling: Sampling | None = None, first_index: int = 0
    ) -> list[Answer]:
        """Answer prompts given as token ids; see `qguard_edge.runtimes.batching.generate`, which runs in the process."""
        check_prompts(prompts, n_new, self.n_ctx)
        sampling = sampling or Sampling()
        request = {
            "do": "generate", "prompts": [[int(n) for n in ids] for ids in prompts], "n_new": n_new,
            "sampling": asdict(sampling), "first_index": first_index,
        }  # fmt: skip
        numbers = self._numbers(request, "running", most=len(prompts) * (2 + n_new))
        answers, at = [], 0
        for _ in prompts:
            count, ended = numbers[at : at + 2].tolist() if at + 2 <= len(numbers) else (-1, 0)
            tokens = numbers[at + 2 : at + 2 + max(count, 0)]
            if not 0 <= count <= n_new or len(tokens) != count:
                raise self._nonsense()
            self._check_ids(tokens)
            answers.append(Answer(tuple(tokens.tolist()), bool(ended)))
            at += 2 + count
        if at != len(numbers):
            raise self._nonsense()
        return answers

    # Talking to the process -----------------------------------------------------------------------------------------

    def _ask(self, request: Mapping[str, Any], doing: str, *, most: int) -> bytearray:
        return self._process.ask(request, f"while {doing} {self._name}", most=most)

    def _numbers(self, request: Mapping[str, Any], doing: str, *, most: int) -> IntArray:
        """A reply of at most `most` int32 values."""
        reply = self._ask(request, doing, most=4 * most)
        if len(reply) % 4:
            raise self._nonsense()
        return np.frombuffer(reply, "<i4").astype(np.int64)

    def _check_ids(self, ids: IntArray) -> None:
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.n_vocab):
            raise LlamaRuntimeError(
                f"{self._name} has {self.n_vocab} tokens; {ids.min()} to {ids.max()} are not all among them"
            )

    def _check_fits(self, length: int) -> None:
        if length > self.n_ctx:
            raise LlamaRuntimeError(f"{length} tokens do not fit a context of {self.n_ctx}; give LlamaModel a larger n_ctx")

    def _nonsense(self) -> LlamaRuntimeError:
        self.close()
        return LlamaRuntimeError(f"the process of llama.cpp gave a reply that is none, with {self._name}; it was stopped")
