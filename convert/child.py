"""Child processes of this program: how they are started, and that none outlives its parent.

Run as `python -P -m convert.child PARENT MODULE ARGUMENT...` (`child_command` makes that line): before the module and whatever it
imports is run, the process asks to die with its parent.
"""

import contextlib
import ctypes
import math
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def child_command(module: str, *arguments: str | Path) -> list[str]:
    """The command line of a child process that runs a module of ours.

    Args:
        module: its full name.
        arguments: of its command line.
    """
    # -P: a folder named `convert` where the user happens to stand must not be imported in our place.
    return [sys.executable, "-P", "-m", "convert.child", str(os.getpid()), module, *map(str, arguments)]


def die_with_parent(parent: int | None = None) -> None:
    """On Linux, ask the kernel to kill this process when the parent is gone.

    The kernel means the parent's *thread*: a child that is started in a pool must not be needed after the pool.

    Args:
        parent: its process id, if known: one that is gone already takes this process with it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def limit_process(*, memory: int | None = None, processor_seconds: int | None = None) -> None:
    """Limits for this process from now on, where the system has them. An abort leaves no core file and no list of addresses.

    Args:
        memory: bytes of address space; None: no limit.
        processor_seconds: None: no limit.
    """
    os.environ["GGML_NO_BACKTRACE"] = "1"
    try:
        import resource
    except ImportError:  # Windows
        return
    for which, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, processor_seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        if limit is None:
            continue
        _, most = resource.getrlimit(which)
        value = limit if most == resource.RLIM_INFINITY else min(limit, most)
        with contextlib.suppress(ValueError, OSError):  # some systems know the limit and refuse to set it
            resource.setrlimit(which, (value, value))


def resident_bytes(field: str = "VmHWM") -> int:
    """A size of this process in bytes; 0 where the system does not tell.

    Args:
        field: of Linux' /proc/self/status: `VmHWM`, the largest resident size so far, or `RssAnon`, what is resident now and
            belongs to no file.
    """
    # Not getrusage: its figure is inherited from the process that started this one.
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    lines = [line for line in status.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


TICK = 1.0
"""Seconds after which silence is counted."""


class Silence:
    """Kills a child that gives no sign of life for too long.

    Seconds are counted, not looked up on a clock: while the whole program is stopped, nothing counts.

    Args:
        child: the process.
        seconds: that it may be silent; infinite for ever.
    """

    def __init__(self, child: subprocess.Popen[bytes], seconds: float) -> None:
        self.listening = True
        self.expired = False
        self._silent = 0.0
        self._child, self._seconds = child, seconds
        self._over = threading.Event()
        if math.isfinite(seconds):
            threading.Thread(target=self._count, daemon=True).start()

    def broken(self) -> None:
        """The child gave a sign of life."""
        self._silent = 0.0

    def end(self) -> None:
        """Watch it no longer."""
        self._over.set()

    def _count(self) -> None:
        while not self._over.wait(TICK):
            self._silent = self._silent + TICK if self.listening else 0
            if self._silent > self._seconds:
                self.expired = True
                self._child.kill()
                return


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
