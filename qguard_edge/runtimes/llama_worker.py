"""Child process that holds one model in llama.cpp and answers requests about it.

Its one argument is the limit of its address space in bytes (0: none). Requests come on standard input, replies go to what was
standard output, framed as in `llama_wire`; the log goes to standard error. A request is a JSON object whose `do` names one of
the functions below. Whole loops run here, so that a generated token does not cross the pipe:

    load         the arguments of `NativeModel`         int32: size of the vocabulary, of a batch
    resize       n_ctx, n_seq                           int32: size of a batch
    tokenize     text, add_special, parse_special       int32: token ids
    detokenize   texts (token ids of each), special     int64: bytes of each text; then the texts
    generate     prompts, n_new, sampling, first_index  int32 for each answer: tokens, whether it ended, its token ids
    decode       tokens, start (0 forgets the rest)     float32 [tokens, vocabulary]: logits
    spent        nothing                                float64: seconds of processor time so far
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from convert.child import limit_process
from convert.llama_limits import LlamaRuntimeError
from qguard_edge.runtimes.batching import Row, Sampling, generate
from qguard_edge.runtimes.llama_native import NativeModel
from qguard_edge.runtimes.llama_wire import PROGRESS, REFUSED, RESULT, WireError, receive, send
from quant_grids.errors import QGuardError

LARGEST_TEXT = 1 << 28
"""Bytes of the text of one request's tokens."""
EVERY = 1.0
"""Seconds between signs of life."""
Reply = bytes | memoryview


class _Model(NativeModel):
    """Gives a sign of life while it loads and after each batch."""

    def __init__(self, alive: Callable[[], None], path: Path, **options: Any) -> None:
        self._alive = alive
        super().__init__(path, **options, on_loading=alive)

    def decode(self, rows: Sequence[Row]) -> npt.NDArray[np.float32]:
        """See `NativeModel.decode`."""
        logits = super().decode(rows)
        self._alive()
        return logits


class Worker:
    """Answers requests.

    Args:
        replies: where signs of life go.
    """

    def __init__(self, replies: IO[bytes]) -> None:
        self._replies = replies
        self._told = time.monotonic()
        self._model: _Model | None = None

    def answer(self, request: Mapping[str, Any]) -> Reply:
        """The reply to one request.

        Raises:
            QGuardError: why there is none.
        """
        asked = dict(request)
        names = {"load", "resize", "tokenize", "detokenize", "generate", "decode", "spent"}
        name = asked.pop("do")
        assert name in names
        reply: Reply = getattr(self, f"_{name}")(**asked)
        return reply

    @property
    def model(self) -> _Model:
        """The one that was loaded."""
        assert self._model is not None
        return self._model

    def _alive(self) -> None:
        now = time.monotonic()
        if now - self._told >= EVERY:
            self._told = now
            send(self._replies, PROGRESS)

    def _load(self, path: str, **options: Any) -> Reply:
        self._model = _Model(self._alive, Path(path), **options)
        return _numbers([self._model.n_vocab, self._model.n_batch])

    def _resize(self, n_ctx: int, n_seq: int) -> Reply:
        self.model.resize(n_ctx=n_ctx, n_seq=n_seq)
        return _numbers([self.model.n_batch])

    def _tokenize(self, text: str, add_special: bool, parse_special: bool) -> Reply:
        return _numbers(self.model.tokenize(text, add_special=add_special, parse_special=parse_special))

    def _detokenize(self, texts: Sequence[Sequence[int]], special: bool) -> Reply:
        made, size = [], 0
        for tokens in texts:
            pieces = []
            for token in tokens:
                pieces.append(piece := self.model.piece(token, special))
                size += len(piece)
                if size > LARGEST_TEXT:
                    raise LlamaRuntimeError(f"the text of {len(tokens)} tokens has more than {LARGEST_TEXT >> 20} MiB")
            made.append(b"".join(pieces))
        return np.array([len(text) for text in made], "<i8").tobytes() + b"".join(made)

    def _generate(
        self, prompts: Sequence[Sequence[int]], n_new: int, sampling: Mapping[str, Any], first_index: int
    ) -> Reply:
        answers = generate(self.model, prompts, n_new, sampling=Sampling(**sampling), first_index=first_index)
        return _numbers([n for answer in answers for n in (len(answer.tokens), answer.ended, *answer.tokens)])

    def _decode(self, tokens: Sequence[int], start: int) -> Reply:
        if start == 0:
            self.model.reset()
        logits = self.model.decode([(token, start + i, 0, True) for i, token in enumerate(tokens)])
        return logits.data.cast("B")

    def _spent(self) -> Reply:
        return np.array([time.process_time()], "<f8").tobytes()


def _numbers(values: Sequence[int]) -> bytes:
    return np.array(values, "<i4").tobytes()


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer until there are no more requests."""
    worker = Worker(replies)
    while True:
        try:
            request = receive(requests)
        except WireError:
            return
        try:
            reply = worker.answer(request)
        except QGuardError as error:
            send(replies, REFUSED, str(error).encode("utf-8", "replace")[:4096])
        except MemoryError:
            send(replies, REFUSED, b"it needs more memory than it may have (QGUARD_LLAMA_GIB)")
        else:
            send(replies, RESULT, reply)


def main() -> None:
    """Entry point of the child process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent as well, which decides
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # so that nothing that is printed gets between the frames
    limits = int(sys.argv[1])
    # A GPU's memory is mapped into the address space, all of it.
    limit_process(memory=None if limits == 0 or llama_cpp.llama_supports_gpu_offload() else limits)
    log = logging.getLogger("qguard_edge.llama_cpp")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.DEBUG)
    with os.fdopen(0, "rb", buffering=0) as requests, replies:
        serve(requests, replies)


if __name__ == "__main__":
    main()
