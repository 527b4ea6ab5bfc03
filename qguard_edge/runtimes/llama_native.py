"""llama.cpp in process: load a GGUF, turn text into token ids, get logits, generate. The only home of inference.

For child processes, and for files that this program's own tests have made: a broken file makes llama.cpp abort, which ends the
process that it is loaded in. Everything else uses `qguard_edge.runtimes.llama.LlamaModel`, which runs this in a worker.

Why not `llama_cpp.Llama`: it hides `use_extra_bufts`, allocates a logits matrix for the whole context and evaluates one
sequence at a time. This module calls the C functions and guarantees three things that a comparison of two files needs:

* **the same numbers for the same input**: fixed thread count and batch size, every sequence in its own KV stream
  (`kv_unified=False`; a unified cache changes the logits of identical sequences, llama.cpp#24962);
* **no repacked weights** (`use_extra_bufts=False`): on processors with AMX the repacked kernels crash for some types
  (llama.cpp#20824), and elsewhere they round differently from the plain ones;
* **errors where llama.cpp reports them**: a file that it refuses or a prompt that does not fit raises `LlamaRuntimeError`.

llama.cpp's own log lines go to the logger `qguard_edge.llama_cpp` at DEBUG level; the last ones are quoted
when a load fails.
"""

import ctypes
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import llama_cpp
import numpy as np
import numpy.typing as npt

from convert.cores import available_cores
from convert.llama_limits import LlamaRuntimeError
from qguard_edge.runtimes.batching import Row, generate

logger = logging.getLogger("qguard_edge.llama_cpp")

FloatArray = npt.NDArray[np.float32]


_recent_log: deque[str] = deque(maxlen=12)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(_level: int, text: bytes, _user_data: Any) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if line.strip(" ."):
        _recent_log.append(line)
        logger.debug("%s", line)


def _install_log() -> None:
    llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))


SHORT_SEQUENCES = 512
"""Tokens of a sequence up to which answers side by side are made without flash attention. On a CPU that takes a third of a small
model's step, and plain attention a tenth off the whole (docs/benchmarks-verify.md); with prompts of 440 tokens both are alike."""


class NativeModel:
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
        n_batch: tokens of one decode call at most; all their logits together take `4 * n_batch * n_vocab` bytes.
        extra_buffers: let llama.cpp repack weights for this processor; see `qguard_edge.runtimes.llama.safe_extra_buffers`.
        on_node: called for every node of every graph, see `qguard_edge.runtimes.ggml_tensor.eval_callback`.
        on_loading: called often while tensors are read.

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
        n_batch: int = 2048,
        extra_buffers: bool = False,
        on_node: Any = None,
        on_loading: Callable[[], None] | None = None,
    ) -> None:
        self._model: Any = None
        self._context: Any = None
        self.n_ctx, self.n_seq, self.n_batch = n_ctx, n_seq, 0
        self._exact, self._on_cpu = exact, n_gpu_layers == 0
        self._name, self._most = Path(path).name, n_batch
        _install_log()
        llama_cpp.llama_backend_init()
        _recent_log.clear()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.use_extra_bufts = extra_buffers
        params.vocab_only = vocab_only
        if on_loading is not None:
            params.progress_callback = _loading_callback(on_loading)
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise LlamaRuntimeError(f"llama.cpp cannot load {self._name}: {_last_error()}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        if vocab_only:
            return
        threads = n_threads or available_cores()
        self._params = ctx_params = llama_cpp.llama_context_default_params()
        ctx_params.kv_unified = False
        ctx_params.n_threads = ctx_params.n_threads_batch = threads
        if exact:
            ctx_params.type_k = ctx_params.type_v = llama_cpp.GGML_TYPE_F32
        if on_node is not None:
            self._on_node = ctx_params.cb_eval = on_node  # kept alive as long as llama.cpp may call it
        self.resize(n_ctx=n_ctx, n_seq=n_seq)

    def resize(self, *, n_ctx: int, n_seq: int) -> None:
        """Another number of sequences and of tokens that each can hold; forgets every sequence.

        Raises:
            LlamaRuntimeError: llama.cpp cannot make such a context.
        """
        self._free_context()
        params = self._params
        params.n_ctx, params.n_seq_max = n_ctx * n_seq, n_seq
        params.n_batch = params.n_ubatch = min(n_ctx * n_seq, self._most)
        plain = self._exact or (n_seq > 1 and n_ctx <= SHORT_SEQUENCES and self._on_cpu)
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED if plain else llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        self.n_ctx, self.n_seq, self.n_batch = n_ctx, n_seq, int(params.n_batch)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise LlamaRuntimeError(f"llama.cpp cannot make a context for {self._name}: {_last_error()}")
        self._batch = llama_cpp.llama_batch_init(self.n_batch, 0, 1)
        # The batch's arrays as numpy views: filling them item by item through ctypes costs as much as a small decode.
        self._tokens, self._positions, self._wanted, counts = (
            np.ctypeslib.as_array(pointer, (self.n_batch,))
            for pointer in (self._batch.token, self._batch.pos, self._batch.logits, self._batch.n_seq_id)
        )
        counts[:] = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free the native memory; safe to call twice."""
        self._free_context()
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def _free_context(self) -> None:
        if self._context:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
            self._context = None

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
        return b"".join(self.piece(token, special) for token in tokens).decode("utf-8", "replace")

    def piece(self, token: int, special: bool = False) -> bytes:
        """What one token adds to a text; control tokens nothing without `special`."""
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
        return np.concatenate([chunk.copy() for chunk in self.logits_chunks(tokens)])

    def logits_chunks(self, tokens: Sequence[int], chunk: int | None = None) -> Iterator[FloatArray]:
        """As `logits`, at most `chunk` (default: `n_batch`) positions at a time, so that memory stays bounded.

        Each array is valid until the next one is taken.
        """
        size = min(chunk or self.n_batch, self.n_batch)
        self._check_fits(len(tokens))
        self.reset()
        for start in range(0, len(tokens), size):
            yield self.decode([(token, start + i, 0, True) for i, token in enumerate(tokens[start : start + size])])

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
        return [list(answer.tokens) for answer in generate(self, prompts, n)]

    def reset(self) -> None:
        """Forget every sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def keep(self, sequence: int, length: int) -> bool:
        """Forget what a sequence holds behind its first `length` tokens.

        Returns:
            False when the model (a recurrent one) can only be cleared as a whole, which is then done.
        """
        memory = llama_cpp.llama_get_memory(self._context)
        if length > 0 and llama_cpp.llama_memory_seq_rm(memory, sequence, length, -1):
            return True
        llama_cpp.llama_memory_seq_rm(memory, sequence, -1, -1)
        return length == 0

    def share(self, count: int) -> bool:
        """Copy what sequence 0 holds to sequences 1 to `count - 1`, which must be empty.

        Returns:
            False for a model with a recurrent state, which is left alone: nothing was copied.
        """
        if llama_cpp.llama_model_is_recurrent(self._model) or llama_cpp.llama_model_is_hybrid(self._model):
            return False
        memory = llama_cpp.llama_get_memory(self._context)
        for sequence in range(1, count):
            llama_cpp.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        return True

    def decode(self, rows: Sequence[Row]) -> FloatArray:
        """Decode (token, position, sequence, logits wanted) rows.

        Returns:
            The logits that were asked for, f32 `[wanted, n_vocab]` in row order: llama.cpp's own memory, valid until the next
            call. Copy what must live longer.

        Raises:
            LlamaRuntimeError: llama.cpp could not decode.
        """
        batch, count = self._batch, len(rows)
        tokens, positions, sequences, wanted = zip(*rows, strict=True)
        batch.n_tokens = count
        self._tokens[:count], self._positions[:count], self._wanted[:count] = tokens, positions, wanted
        for i, sequence in enumerate(sequences):
            batch.seq_id[i][0] = sequence
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise LlamaRuntimeError(f"llama.cpp could not decode {count} tokens (status {status}): {_last_error()}")
        outputs = sum(wanted)
        if outputs == 0:
            return np.empty((0, self.n_vocab), np.float32)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (outputs, self.n_vocab))

    def _check_fits(self, length: int) -> None:
        if length > self.n_ctx:
            raise LlamaRuntimeError(f"{length} tokens do not fit a context of {self.n_ctx}; give it a larger n_ctx")


def _loading_callback(function: Callable[[], None]) -> Any:
    """llama.cpp's callback while it loads: told how far it is, it says whether to go on."""

    def loading(_share: float, _user_data: Any) -> bool:
        function()
        return True

    return llama_cpp.llama_progress_callback(loading)


def _last_error() -> str:
    """The most telling of llama.cpp's last log lines."""
    errors = [line for line in _recent_log if "error" in line.lower() or "failed" in line.lower()]
    lines = errors or list(_recent_log)
    return " / ".join(lines[:2]) if lines else "it gave no reason"
