"""llama.cpp with everything that rounds switched off, so that what remains is the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp

from qguard_edge.llama_runtime import LlamaModel

GGML_TYPE_F32 = 0


def exact_llama(path: Path, n_ctx: int = 512) -> LlamaModel:
    """A loaded GGUF whose key/value cache is float32 and whose attention is the plain one.

    llama.cpp's defaults keep keys and values in half precision, which alone moves logits by 1e-3 or more;
    that is llama.cpp's choice at run time and says nothing about a file. Only the context's parameters are
    changed.
    """
    defaults = llama_cpp.llama_context_default_params

    def exact() -> Any:
        params = defaults()
        params.type_k = params.type_v = GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return params

    with mock.patch.object(llama_cpp, "llama_context_default_params", exact):
        return LlamaModel(path, n_ctx=n_ctx, n_threads=1)
