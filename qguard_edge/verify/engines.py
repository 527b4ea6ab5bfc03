"""Which engine runs what was given: llama.cpp for GGUF files, transformers for Hugging Face folders."""

import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from convert.cores import available_cores
from qguard_edge import __version__
from qguard_edge.runtimes.llama import safe_extra_buffers
from qguard_edge.verify.files import PairError
from qguard_edge.verify.gguf_subject import GgufEngine
from qguard_edge.verify.runner import LlamaFactory
from qguard_edge.verify.subjects import Engine


def engine_of(
    given: Sequence[Path],
    *,
    threads: int = 0,
    n_gpu_layers: int = 0,
    extra_buffers: bool | None = None,
    device: str = "auto",
    load_in: str | None = None,
) -> Engine:
    """The engine for models that are compared with each other.

    Args:
        given: all of them.
        threads: of all models together; 0 for all cores.
        n_gpu_layers: layers on the GPU, of GGUF files.
        extra_buffers: repacked weights; None: where they are safe.
        device: auto, cpu or cuda, of folders.
        load_in: format in which bitsandbytes rounds full-precision folders while they are loaded; None: as they are.

    Raises:
        PairError: some of each kind, or an option that belongs to the other kind.
        DeviceError: `device` is not there.
    """
    threads = threads or available_cores()
    folders = [path for path in given if path.is_dir()]
    if not folders:
        if load_in or device != "auto":
            raise PairError("--load-in and --device are for folders; a GGUF runs in llama.cpp as it is (--n-gpu-layers)")
        at_once = side_by_side(len(given), threads) if n_gpu_layers == 0 else 1
        buffers = safe_extra_buffers() if extra_buffers is None else extra_buffers
        return GgufEngine(LlamaFactory(threads // at_once, n_gpu_layers, buffers), at_once)
    for path in given:
        if not path.is_dir():
            raise PairError(f"{folders[0].name} is a folder and {path.name} is none; verify compares folders, or GGUF files")
    if n_gpu_layers:
        raise PairError("--n-gpu-layers is for GGUF files; give --device cuda for folders")
    # torch and transformers, which no check of a GGUF needs
    from qguard_edge.runtimes.devices import resolve_device
    from qguard_edge.verify.folder_subject import FolderEngine, FolderFactory

    return FolderEngine(FolderFactory(resolve_device(device), load_in, threads))


def side_by_side(files: int, threads: int) -> int:
    """How many of some files are run at once, so that all threads are used and every file has the same number of them."""
    return max((count for count in range(1, files + 1) if threads % count == 0), default=1)


def all_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of everything that decides the numbers: this program, Python, the engine's packages and the statistics."""
    own = {"qguard-edge": __version__, "python": platform.python_version()}
    return {**own, **versions_of((*packages, "bandit", "scipy", "numpy"))}


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
