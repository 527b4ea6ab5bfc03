"""llama.cpp in process: load a GGUF, turn text into token ids, get logits, generate greedily. The only home of inference.

Why not `llama_cpp.Llama`: it hides `use_extra_bufts`, allocates a logits matrix for the whole context and evaluates one
sequence at a time. This module speaks to the C functions and keeps three promises that a comparison of two files needs:

* **the same numbers for the same input**: fixed thread count and batch size, every sequence in its own KV stream
  (`kv_unified=False`; a unified cache changes the logits of identical sequences, llama.cpp#24962);
* **no repacked weights** (`use_extra_bufts=False`): on processors with AMX the repacked kernels crash for some types
  (llama.cpp#20824), and elsewhere they round differently from the plain ones;
* **errors instead of aborts**: a file that does not load or a prompt that does not fit raises `LlamaRuntimeError`.

llama.cpp's own log lines go to the logger `qguard_edge.llama_cpp` at DEBUG level; the last ones are quoted
when a load fails.
"""

import ctypes
import logging
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import llama_cpp
import numpy as np
import numpy.typing as npt

from quant_grids.errors import QGuardError

logger = logging.getLogger("qguard_edge.llama_cpp")

FloatArray = npt.NDArray[np.float32]


class LlamaRuntimeError(QGuardError):
    """llama.cpp refused a file or could not decode."""


_recent_log: deque[str] = deque(maxlen=12)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(_level: int, text: bytes, _user_data: Any) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if line.strip(" ."):
        _recent_log.append(line)
        logger.debug("%s", line)


def _install_log() -> None:
    llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))


def system_info() -> str:
    """CPU features and build flags as llama.cpp reports them."""
    return str(llama_cpp.llama_print_system_info().decode())


class LlamaModel:
    """A GGUF loaded for CPU (or partly offloaded) inference with `n_seq` independent sequences.

    Use as a context manager; the native memory is freed on exit.

    Args:
        path: the GGUF file (first shard of a split one).
        n_ctx: tokens each sequence can hold.
        n_threads: worker threads; default: all cores.
        n_seq: sequences decoded side by side.
        n_gpu_layers: layers to offload, 0 for none.
        vocab_only: load the tokenizer alone (no decoding).
        exact: keep keys and values in f32 and use plain attention. llama.cpp's default half-precision cache alone moves logits
            by some 1e-3; exact is for comparing files with other programs, the default is what users run.

    Raises:
        LlamaRuntimeError: llama.cpp could not load the file.
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
    ) -> None:
        self._model: Any = None
        self._context: Any = None
        self.n_ctx, self.n_seq = n_ctx, n_seq
        _install_log()
        llama_cpp.llama_backend_init()
        _recent_log.clear()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.use_extra_bufts = False
        params.vocab_only = vocab_only
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise LlamaRuntimeError(f"llama.cpp cannot load {Path(path).name}: {_last_error()}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        if vocab_only:
            return
        threads = n_threads or os.cpu_count() or 1
        ctx_params = llama_cpp.llama_context_default_params()
        ctx_params.n_ctx = n_ctx * n_seq
        ctx_params.n_batch = ctx_params.n_ubatch = min(n_ctx * n_seq, 2048)
        ctx_params.n_seq_max = n_seq
        ctx_params.kv_unified = False
        ctx_params.n_threads = ctx_params.n_threads_batch = threads
        if exact:
            ctx_params.type_k = ctx_params.type_v = llama_cpp.GGML_TYPE_F32
            ctx_params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._n_batch = int(ctx_params.n_batch)
        self._context = llama_cpp.llama_init_from_model(self._model, ctx_params)
        if not self._context:
            self.close()
            raise LlamaRuntimeError(f"llama.cpp cannot make a context for {Path(path).name}: {_last_error()}")
        self._batch = llama_cpp.llama_batch_init(self._n_batch, 0, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the native memory; safe to call twice."""
        if self._context:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
            self._context = None
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    # Tokenizer ------------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text`; `parse_special` reads `<|im_start|>` and the like as control tokens."""
        raw = text.encode("utf-8")
        size = len(raw) + 8
        ids = (ctypes.c_int32 * size)()
        count = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), ids, size, add_special, parse_special)
        if count < 0:
            raise LlamaRuntimeError(f"llama.cpp could not tokenize a text of {len(raw)} bytes")
        return list(ids[:count])

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of `tokens`; control tokens are written only with `special`."""
        return b"".join(self._piece(token, special) for token in tokens).decode("utf-8", "replace")

    def _piece(self, token: int, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, 256, 0, special)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, -count, 0, special)
        return bytes(buffer.raw[:count])

    def is_end(self, token: int) -> bool:
        """Whether generation stops at this token (EOS, EOT, ...)."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    # Decoding -------------------------------------------------------------------------------------------------------

    def logits(self, tokens: Sequence[int]) -> FloatArray:
        """Next-token logits after every position of one sequence: f32 `[n_tokens, n_vocab]`."""
        self._check_fits(len(tokens))
        self.reset()
        parts = []
        for start in range(0, len(tokens), self._n_batch):
            piece = tokens[start : start + self._n_batch]
            rows = [(token, start + i, 0, True) for i, token in enumerate(piece)]
            parts.append(self._decode(rows))
        return np.concatenate(parts)

    def greedy(self, tokens: Sequence[int], n: int) -> list[int]:
        """The `n` most likely next tokens, one after the other; stops early at an end token (which is not returned)."""
        return self.greedy_batch([tokens], n)[0]

    def greedy_batch(self, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
        """Greedy continuations of many prompts, `n_seq` of them in flight at a time.

        Args:
            prompts: token ids of each prompt, none longer than `n_ctx - n`.
            n: new tokens at most.

        Returns:
            New tokens of each prompt in order, end token excluded.
        """
        for prompt in prompts:
            self._check_fits(len(prompt) + n)
        answers: list[list[int]] = [[] for _ in prompts]
        waiting = iter(range(len(prompts)))
        free = list(range(self.n_seq))
        active: dict[int, int] = {}  # sequence slot -> prompt
        pending: dict[int, int] = {}  # sequence slot -> token to feed next
        self.reset()
        while True:
            for slot, index in zip(list(free), waiting, strict=False):
                free.remove(slot)
                active[slot] = index
                pending[slot] = self._prefill(prompts[index], slot)
            if not active:
                return answers
            for slot in list(active):
                answer, token = answers[active[slot]], pending[slot]
                ended = len(answer) >= n or self.is_end(token)
                if not ended:
                    answer.append(token)
                if ended or len(answer) == n:
                    del active[slot], pending[slot]
                    free.append(slot)
                    self._forget(slot)
            if active:
                slots = sorted(active)
                rows = []
                for slot in slots:
                    index = active[slot]
                    rows.append((pending[slot], len(prompts[index]) + len(answers[index]) - 1, slot, True))
                best = self._decode(rows).argmax(-1)
                pending.update(zip(slots, (int(token) for token in best), strict=True))

    def _prefill(self, prompt: Sequence[int], slot: int) -> int:
        """Feed a whole prompt into one sequence; returns the most likely next token."""
        row: FloatArray | None = None
        for start in range(0, len(prompt), self._n_batch):
            piece = prompt[start : start + self._n_batch]
            last = start + len(piece) == len(prompt)
            rows = [(t, start + i, slot, last and i == len(piece) - 1) for i, t in enumerate(piece)]
            row = self._decode(rows)
        if row is None:
            raise LlamaRuntimeError("a prompt needs at least one token")
        return int(row[-1].argmax())

    def reset(self) -> None:
        """Forget every sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _forget(self, slot: int) -> None:
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._context), slot, -1, -1)

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> FloatArray:
        """Decode (token, position, sequence, wants logits) rows; returns the logits rows that were asked for."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise LlamaRuntimeError(f"llama.cpp could not decode {len(rows)} tokens (status {status}): {_last_error()}")
        count = sum(wanted for *_, wanted in rows)
        if count == 0:
            return np.empty((0, self.n_vocab), np.float32)
        view = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (count, self.n_vocab))
        return view.copy()

    def _check_fits(self, length: int) -> None:
        if length > self.n_ctx:
            raise LlamaRuntimeError(f"{length} tokens do not fit a context of {self.n_ctx}; give LlamaModel a larger n_ctx")


def _last_error() -> str:
    """The most telling of llama.cpp's last log lines."""
    errors = [line for line in _recent_log if "error" in line.lower() or "failed" in line.lower()]
    lines = errors or list(_recent_log)
    return " / ".join(lines[:2]) if lines else "it gave no reason"
