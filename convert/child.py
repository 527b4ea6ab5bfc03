"""What a child process that runs llama.cpp does about itself."""

import ctypes
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """On Linux, ask the kernel to kill this process when the parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


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
