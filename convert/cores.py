"""How many processor cores this process may use."""

import os


def available_cores() -> int:
    """Cores that the scheduler gives this process: fewer than the machine has under `taskset` or a container's cpuset.

    More threads than cores is not merely useless: llama.cpp's and OpenMP's threads spin while they wait for each other, and a
    spinning thread without a core of its own holds up the one that works.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1
