"""Child processes that run llama.cpp, which may abort on a broken model: how they are started, listened to, and mourned.

A child is a module of this package, run with the path of a job file. Lines of JSON behind `MARK` on its standard output are
events; everything else there, llama.cpp's log included, is kept for the message if it dies.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from convert.child import child_command

MARK = "@qguard-event "
Event = Mapping[str, Any]


def tell(**event: Any) -> None:
    """In the child: one event for the parent. `error="..."` is the reason that the parent will give."""
    sys.stdout.write(MARK + json.dumps(event) + "\n")
    sys.stdout.flush()


def run_child(module: str, job: Path, *, threads: int = 1, on_event: Callable[[Event], None] | None = None) -> str:
    """Run a module as a child process until it ends.

    Args:
        module: its full name.
        job: the one argument.
        threads: of its matrix products. llama.cpp and BLAS take turns on the same cores, so neither spins while it waits.
        on_event: called with each event; if it raises, the child is killed.

    Returns:
        Why it failed, in words; empty if it did not.
    """
    command = child_command(module, job)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    waiting = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "10"}  # the second: 2^10 cycles, not 2^26
    environment = os.environ | dict.fromkeys(names, str(threads)) | waiting
    error, last = "", list[str]()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
    ) as child:
        try:
            assert child.stdout is not None
            for raw in child.stdout:
                line = raw.decode("utf-8", "replace").rstrip()
                if line.startswith(MARK):
                    event = json.loads(line.removeprefix(MARK))
                    error = str(event.get("error", error))
                    if on_event is not None:
                        on_event(event)
                elif line:
                    last = [*last[-2:], line]
            code = child.wait()
        except BaseException:
            child.kill()
            raise
    if code == 0:
        return ""
    if error:
        return error
    died = f"llama.cpp was stopped by signal {-code}" if code < 0 else f"llama.cpp ended with status {code}"
    return f"{died} ({' / '.join(last)[-300:]})" if last else died
