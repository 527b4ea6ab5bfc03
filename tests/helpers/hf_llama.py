"""llama.cpp with everything that rounds switched off, so that what remains is the model."""

from __future__ import annotations

from pathlib import Path

from qguard_edge.runtimes.llama_native import NativeModel


def exact_llama(path: Path, n_ctx: int = 512) -> NativeModel:
    """A loaded GGUF whose key/value cache is float32 and whose attention is the plain one."""
    return NativeModel(path, n_ctx=n_ctx, n_threads=1, exact=True)
