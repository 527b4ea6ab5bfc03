"""Where torch computes: which device, how many threads, and whether in bf16."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from quant_grids.errors import QGuardError


class DeviceError(QGuardError):
    """The wanted device is not there."""


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a torch device.

    Raises:
        DeviceError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: torch finds no CUDA device; use --device cpu or install a CUDA build of torch")
    if name not in ("cpu", "cuda"):
        raise DeviceError(f"--device {name!r}: choose auto, cpu or cuda")
    return torch.device(name)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Limit torch's threads for a while; 0 leaves them."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 matrix products where the device is fast at them, else nothing."""
    if device.type == "cpu":
        from qguard_edge.runtimes.devices import fast_bf16

        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bf16())
    return torch.autocast(device.type, dtype=torch.bfloat16)


def fast_bf16() -> bool:
    """Whether bf16 matrix products are worth it on this processor."""
    capability = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(capability())
