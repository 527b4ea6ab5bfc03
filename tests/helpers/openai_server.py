"""llama-cpp-python's own server without repacked weights, which crash on processors with AMX (llama.cpp#20824)."""

from typing import Any

import llama_cpp.llama_cpp as native
from llama_cpp.server.__main__ import main

_defaults = native.llama_model_default_params


def plain_buffers() -> Any:
    """The defaults, without repacked weights."""
    params = _defaults()
    params.use_extra_bufts = False
    return params


if __name__ == "__main__":
    native.llama_model_default_params = plain_buffers
    main()  # type: ignore[no-untyped-call]
