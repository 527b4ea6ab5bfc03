"""What a command does when it is told to stop: it cleans up, says so, and ends with 128 + the signal's number.

A signal becomes an exception in the main thread, so that work folders, temporary files and locks go the way that they go after
any error. The main thread may not get there: it may sit in native code for minutes, or the exception may be raised where
Python swallows it (in a callback of C code). So a second thread hears of every signal as well, through a pipe that Python
writes to at once. It waits a few seconds, or for a second signal, then removes by itself what the run holds, and ends the
process.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE = 5.0
"""Seconds that the main thread has to clean up; after a second signal it has none."""


class StoppedError(BaseException):
    """A signal asked this process to stop.

    Attributes:
        number: of the signal.
        left: what the command leaves behind, for people.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.left = "nothing was left behind under the final name"

    @property
    def exit_code(self) -> int:
        """What a shell shows for a process that the signal ended."""
        return 128 + self.number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}; {self.left}"


def _watched() -> list[signal.Signals]:
    """The signals that stop a command, without those that whoever started it chose to ignore (nohup, background jobs)."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [number for name in names if signal.getsignal(number := signal.Signals[name]) is not signal.SIG_IGN]


@contextmanager
def leaving(what: str) -> Iterator[None]:
    """Whoever stops the block is told that it leaves this behind."""
    try:
        yield
    except StoppedError as stop:
        stop.left = what or stop.left
        raise


@contextmanager
def heeding_signals(at_last: Callable[[StoppedError], None]) -> Iterator[None]:
    """While the block runs, SIGINT, SIGTERM and SIGHUP raise `StoppedError` in it. Only in the main thread.

    Args:
        at_last: called in another thread if the block does not end in time; the process ends after it.
    """
    raised = threading.Event()

    def handle(number: int, _frame: FrameType | None) -> None:
        if not raised.is_set():  # once: a second one must not break the cleaning up
            raised.set()
            raise StoppedError(number)

    hear, tell = socket.socketpair()
    tell.setblocking(False)
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(hear, ended, at_last), name="signals", daemon=True)
    before = {number: signal.signal(number, handle) for number in _watched()}
    wakeup = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    watch.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        ended.set()
        tell.close()
        watch.join()
        hear.close()


def _watch(hear: socket.socket, ended: threading.Event, at_last: Callable[[StoppedError], None]) -> None:
    stop: StoppedError | None = None
    while True:
        try:
            heard = hear.recv(1)
        except TimeoutError:
            heard = b"\0"
        if not heard or ended.is_set():
            return
        if heard[0] not in {int(number) for number in signal.Signals} and stop is None:
            continue
        if stop is not None:
            at_last(stop)
            os._exit(stop.exit_code)
        stop = StoppedError(heard[0])
        hear.settimeout(GRACE)
