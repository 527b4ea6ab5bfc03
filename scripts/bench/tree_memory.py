"""Anonymous memory of a process and all that it has started, sampled while it runs.

Run: python scripts/bench/tree_memory.py [--trace FILE] COMMAND ...

What is counted is `RssAnon` of Linux' /proc/PID/status: memory that belongs to no file. Pages of a mapped model are file pages,
which the system takes back when it needs them; their largest sum stands beside it. Prints one JSON object on standard error.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

INTERVAL = 0.05  # seconds between two samples


@dataclass
class Peaks:
    """Largest sums so far, in bytes.

    Attributes:
        anonymous: of memory that belongs to no file.
        mapped: of pages that belong to files.
        processes: that ran at a time.
        samples: taken.
    """

    anonymous: int = 0
    mapped: int = 0
    processes: int = 0
    samples: int = 0


def tree_of(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += tree_of(int(child))
    return found


def sizes_of(pid: int) -> tuple[int, int]:
    """Bytes of anonymous memory and of file pages of one process; zeros once it is gone."""
    sizes = {"RssAnon": 0, "RssFile": 0}
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in sizes:
                sizes[name] = int(value.split()[0]) * 1024
    return sizes["RssAnon"], sizes["RssFile"]


class TreeMemory:
    """Samples a process tree in a thread; a context manager.

    Args:
        pid: of the tree's root; by default this process.
        trace: gets a line of seconds and MiB per process for each sample.
    """

    def __init__(self, pid: int | None = None, trace: Path | None = None) -> None:
        self.peaks = Peaks()
        self._pid, self._trace = pid or os.getpid(), trace
        self._stop, self._thread = Event(), Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "TreeMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(self._trace.open("w")) if self._trace else None
            while not self._stop.wait(INTERVAL):
                sizes = [sizes_of(pid) for pid in tree_of(self._pid)]
                peaks = self.peaks
                peaks.anonymous = max(peaks.anonymous, sum(size for size, _ in sizes))
                peaks.mapped = max(peaks.mapped, sum(size for _, size in sizes))
                peaks.processes = max(peaks.processes, len(sizes))
                peaks.samples += 1
                if file:
                    mib = " ".join(f"{anonymous >> 20}" for anonymous, _ in sizes)
                    file.write(f"{time.monotonic() - started:.2f} {mib}\n")


def main() -> None:
    """Run a command and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    started = time.monotonic()
    with subprocess.Popen(arguments.command) as child, TreeMemory(child.pid, arguments.trace) as memory:
        code = child.wait()
    used = os.times()
    found = asdict(memory.peaks) | {
        "seconds": time.monotonic() - started,
        "processor": used.children_user + used.children_system,
        "exit": code,
    }
    print(json.dumps(found), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
