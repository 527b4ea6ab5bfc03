"""Child processes that run llama.cpp: how they are started, limited, listened to, and mourned.

llama.cpp aborts on many a broken file, and may hang or grow, so nothing that it loads is loaded in the caller's process. There
are two kinds of children, both modules of this package:

* `run_child` runs one job to its end. Lines of JSON behind `MARK` on its standard output are events.
* `LlamaProcess` answers requests, one after the other, with the model kept open (`llama_worker`, frames as in `llama_wire`).

Whatever else a child writes is llama.cpp's log: its last lines are quoted when it dies. A child has an address space of a
limited size (POSIX) and may be silent for a limited time; see `ChildLimits`.
"""

import json
import logging
import os
import re
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from convert.child import Silence, child_command
from convert.llama_limits import GIB, MEMORY_VARIABLE, SECONDS_VARIABLE, ChildLimits, LlamaRuntimeError
from qguard_edge.runtimes.llama_wire import PROGRESS, REFUSED, RESULT, WireError, read_into, read_start, send

MARK = "@qguard-event "
Event = Mapping[str, Any]
LONGEST_LINE = 1 << 16
QUOTED = 300
"""Characters of the log in a message."""
TELLING = re.compile(
    r"error|failed|what\(\)|bad_alloc|allocat|out of memory|exception|unsupported|\.(c|cpp|h|cu|py):?\d+:", re.I
)
FOLDERS = re.compile(r"\S*/(?=[\w.-]+:\d+)")
"""Of the machine on which llama.cpp was built, before a file of its source."""

logger = logging.getLogger("qguard_edge.llama_cpp")


def tell(**event: Any) -> None:
    """In the child of `run_child`: one event for the parent. `error="..."` is the reason that the parent will give."""
    os.write(1, f"{MARK}{json.dumps(event)}\n".encode())


def _ending(code: int, lines: Sequence[str], limits: ChildLimits, expired: bool, doing: str = "") -> str:
    """How a child ended, in words.

    Args:
        code: its exit status, negative for a signal.
        lines: of its log, the last ones.
        limits: that it had.
        expired: it was silent for too long.
        doing: what it was at, such as `while loading X`; may be empty.
    """
    telling = [line for line in lines if TELLING.search(line)] or lines
    unlike = list(dict.fromkeys(FOLDERS.sub("", line) for line in telling))  # every thread may say the same
    reasons = ["".join(c if c.isprintable() else "?" for c in " / ".join(unlike[-2:])[:QUOTED])] if unlike else []
    if expired:
        words = f"llama.cpp was stopped after {limits.seconds:.0f} s without a sign of life"
        reasons.append(f"{SECONDS_VARIABLE} sets that limit")
    else:
        words = f"llama.cpp was stopped by signal {-code}" if code < 0 else f"llama.cpp ended with status {code}"
        if limits.memory is not None and any(word in "".join(reasons) for word in ("alloc", "emory")):
            reasons.append(f"its address space is limited to {limits.memory / GIB:.3g} GiB, {MEMORY_VARIABLE} sets that")
    because = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{words} {doing}".rstrip() + because


def run_child(
    module: str, *files: Path, limits: ChildLimits, threads: int = 1, on_event: Callable[[Event], None] | None = None
) -> str:
    """Run a module as a child process until it ends.

    Args:
        module: its full name.
        files: its first arguments; the last is the limit of its address space, which it sets itself.
        limits: what it may take.
        threads: of its matrix products. llama.cpp and BLAS take turns on the same cores, so neither spins while it waits.
        on_event: called with each event; if it raises, the child is killed.

    Returns:
        Why it failed, in words; empty if it did not.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    waiting = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "10"}  # the second: 2^10 cycles, not 2^26
    environment = dict.fromkeys(names, str(threads)) | waiting
    error, last = "", deque[str](maxlen=12)
    command = child_command(module, *map(str, files), str(limits.memory or 0))
    with _popen(command, environment, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT) as child:
        silence = Silence(child, limits.seconds)
        try:
            assert child.stdout is not None
            while raw := child.stdout.readline(LONGEST_LINE):
                silence.broken()
                line = raw.decode("utf-8", "replace").rstrip()
                if line.startswith(MARK):
                    event = json.loads(line.removeprefix(MARK))
                    error = str(event.get("error", error))
                    if on_event is not None:
                        on_event(event)
                elif line:
                    last.append(line)
            code = child.wait()
        except BaseException:
            child.kill()
            raise
        finally:
            silence.end()
    if code == 0:
        return ""
    return error or _ending(code, last, limits, silence.expired)


def _popen(
    command: Sequence[str], environment: dict[str, str], *, stdin: int, stderr: int, buffered: int = -1
) -> subprocess.Popen[bytes]:
    variables = os.environ | environment
    return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, env=variables, bufsize=buffered)


class LlamaProcess:
    """A child process with a model, see `llama_worker`.

    Args:
        limits: what it may take.
    """

    def __init__(self, limits: ChildLimits) -> None:
        self._limits = limits
        self._last = deque[str](maxlen=12)
        self._ended = ""
        command = child_command("qguard_edge.runtimes.llama_worker", str(limits.memory or 0))
        self._child = _popen(command, {}, stdin=subprocess.PIPE, stderr=subprocess.PIPE, buffered=0)
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._requests, self._replies = self._child.stdin, self._child.stdout
        _widen(self._replies)
        self._silence = Silence(self._child, limits.seconds)
        self._silence.listening = False
        self._listener = threading.Thread(target=_listen, args=(self._child.stderr, self._last), daemon=True)
        self._listener.start()

    def ask(self, request: Mapping[str, Any], doing: str, *, most: int) -> bytearray:
        """One request.

        Args:
            request: see `llama_worker`.
            doing: what the child is doing with it, for the message if it dies.
            most: bytes of the reply.

        Raises:
            LlamaRuntimeError: llama.cpp refused, or the child ended.
        """
        reply = bytearray()

        def space(size: int) -> memoryview:
            nonlocal reply
            if size > most:
                raise WireError(f"{size} bytes came where at most {most} were expected")
            reply = bytearray(size)
            return memoryview(reply)

        self._ask(request, doing, space)
        return reply

    def ask_into(self, request: Mapping[str, Any], doing: str, space: memoryview) -> None:
        """One request whose reply has the size of `space` (bytes), where it is put; errors as in `ask`."""

        def exactly(size: int) -> memoryview:
            if size != len(space):
                raise WireError(f"{size} bytes came where {len(space)} were expected")
            return space

        self._ask(request, doing, exactly)

    def _ask(self, request: Mapping[str, Any], doing: str, space: Callable[[int], memoryview]) -> None:
        if self._ended:
            raise LlamaRuntimeError(self._ended)
        message = json.dumps(request).encode()  # escaped: a file's name need not be UTF-8
        self._silence.broken()
        self._silence.listening = True
        try:
            send(self._requests, RESULT, message)
            refused = self._receive(space)
        except (WireError, OSError) as error:
            self._ended = self._mourn(doing, error)
            raise LlamaRuntimeError(self._ended) from None
        except BaseException:
            # What is left of the reply would be taken for that to the next request.
            self.close()
            raise
        finally:
            self._silence.listening = False
        if refused:
            raise LlamaRuntimeError(refused)

    def _receive(self, space: Callable[[int], memoryview]) -> str:
        """The reply into `space(size)`; returns why there is none, in words."""
        while True:
            kind, size = read_start(self._replies)
            self._silence.broken()
            if kind == RESULT:
                read_into(self._replies, space(size), self._silence.broken)
                return ""
            if kind == PROGRESS and size == 0:
                continue
            if kind != REFUSED or size > LONGEST_LINE:
                raise WireError(f"a reply of kind {kind} and {size} bytes")
            text = bytearray(size)
            read_into(self._replies, memoryview(text), self._silence.broken)
            return "".join(c if c.isprintable() else "?" for c in text.decode("utf-8", "replace")) or "it gave no reason"

    def _mourn(self, doing: str, error: Exception) -> str:
        """How it ended, in words."""
        broken = isinstance(error, WireError) and str(error)
        if broken:
            self._child.kill()
        code = self._child.wait()
        expired = self._silence.expired
        self.close()
        if broken:
            return f"the process of llama.cpp was stopped {doing}: {broken}"
        return _ending(code, self._last, self._limits, expired, doing)

    def close(self) -> None:
        """End the process; safe to call twice."""
        self._ended = self._ended or "the model is closed"
        self._silence.end()
        self._child.kill()
        self._child.wait()
        self._listener.join(timeout=5)
        for stream in (self._requests, self._replies, self._child.stderr):
            with suppress(OSError):
                if stream is not None:
                    stream.close()


def _widen(stream: IO[bytes]) -> None:
    """Let a pipe hold 1 MiB where the system can: logits go through it."""
    with suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(stream.fileno(), fcntl.F_SETPIPE_SZ, 1 << 20)


def _listen(log: IO[bytes] | None, last: deque[str]) -> None:
    """Read a child's log to its end."""
    assert log is not None
    rest = b""
    while raw := log.read(LONGEST_LINE):
        *lines, rest = (rest + raw).split(b"\n")
        rest = rest[:LONGEST_LINE]
        for line in lines:
            _note(line, last)
    _note(rest, last)


def _note(raw: bytes, last: deque[str]) -> None:
    line = raw.decode("utf-8", "replace").rstrip()
    if line:
        last.append(line)
        logger.debug("%s", line)
