"""Child process that loads a model and its vision or audio half in llama.cpp's multimodal library (libmtmd).

Run by `llama_child.run_child` with the two files and the limit of the address space; tells what the pair takes beside text
(`halves`), and ends with 1 if it cannot be loaded.
"""

import ctypes
import os
import sys

import llama_cpp
from llama_cpp import mtmd_cpp

from convert.child import limit_process
from qguard_edge.runtimes.llama_child import tell


def main() -> None:
    """Entry point of the child process."""
    model_path, mmproj_path, limit = sys.argv[1:]
    limit_process(memory=int(limit) or None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(os.fsencode(model_path), params)
    if not model:
        sys.exit(1)
    options = mtmd_cpp.mtmd_context_params_default()
    options.use_gpu, options.warmup, options.print_timings = False, False, False
    context = mtmd_cpp.mtmd_init_from_file(os.fsencode(mmproj_path), ctypes.c_void_p(model), options)
    if not context:
        sys.exit(1)
    halves = [
        name
        for name, supported in (("vision", mtmd_cpp.mtmd_support_vision), ("audio", mtmd_cpp.mtmd_support_audio))
        if supported(context)
    ]
    mtmd_cpp.mtmd_free(context)
    llama_cpp.llama_model_free(model)
    tell(halves=halves)


if __name__ == "__main__":
    main()
