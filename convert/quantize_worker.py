"""Child process that runs `llama_model_quantize`; the only place in `convert` that imports llama_cpp.

Run by `convert.child` with two arguments: the JSON of a job, as `convert.quantizer.quantize` makes it, and the limit of its
address space in bytes (0: none). llama.cpp's log goes to standard output; the exit status is 0 when it succeeded.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp

from convert.child import limit_process, resident_bytes
from convert.cores import available_cores
from convert.imatrix_file import load_imatrix
from convert.quantizer import USAGE_MARK, ggml_type_number, parse_override
from quant_grids.errors import QGuardError


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(_level: int, text: bytes, _user_data: Any) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def _override_array(overrides: list[tuple[str, str, str]]) -> Any:
    """`llama_model_kv_override[]` with a zeroed end marker."""
    array = (llama_cpp.llama_model_kv_override * (len(overrides) + 1))()
    for slot, (key, kind, value) in zip(array, overrides, strict=False):
        slot.key = key.encode()
        if kind == "int":
            slot.tag, slot.value.val_i64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT, int(value)
        elif kind == "float":
            slot.tag, slot.value.val_f64 = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_FLOAT, float(value)
        elif kind == "bool":
            slot.tag, slot.value.val_bool = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_BOOL, value == "true"
        else:
            slot.tag, slot.value.val_str = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    return array


def _tensor_type_array(pairs: list[tuple[str, str]]) -> Any:
    """`llama_model_tensor_override[]`, ended by a null pattern."""
    array = (llama_cpp.llama_model_tensor_override * (len(pairs) + 1))()
    for slot, (pattern, type_name) in zip(array, pairs, strict=False):
        slot.pattern = pattern.encode()
        slot.type = ggml_type_number(type_name, "--tensor-type")
    return array


def _imatrix_array(path: Path, overrides: list[tuple[str, str, str]]) -> Any:
    """`llama_model_imatrix_data[]`, ended by a null name; adds to `overrides` what llama-quantize records about it."""
    imatrix = load_imatrix(path)
    array = (llama_cpp.llama_model_imatrix_data * (len(imatrix.entries) + 1))()
    for slot, (name, values) in zip(array, imatrix.entries.items(), strict=False):
        slot.name = name.encode()
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        slot.size = values.size
    overrides.append(("quantize.imatrix.file", "str", imatrix.file_name[:127]))
    if imatrix.datasets:
        overrides.append(("quantize.imatrix.dataset", "str", imatrix.datasets[0][:127]))
    overrides.append(("quantize.imatrix.entries_count", "int", str(len(imatrix.entries))))
    if imatrix.chunk_count > 0:
        overrides.append(("quantize.imatrix.chunks_count", "int", str(imatrix.chunk_count)))
    # The C array points into the numpy buffers: keep both alive together.
    return array, imatrix


def run(job: dict[str, Any]) -> int:
    """Carry out one job; returns llama.cpp's status (0: success)."""
    llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = job["file_type"]
    params.nthread = job["threads"] or available_cores()
    params.pure = job["pure"]
    params.quantize_output_tensor = not job["leave_output_tensor"]
    params.allow_requantize = job["allow_requantize"]
    params.dry_run = job["dry_run"]
    if job["output_tensor_type"]:
        params.output_tensor_type = ggml_type_number(job["output_tensor_type"], "--output-tensor-type")
    if job["token_embedding_type"]:
        params.token_embedding_type = ggml_type_number(job["token_embedding_type"], "--token-embedding-type")
    overrides = [parse_override(text) for text in job["override_kv"]]
    if job["imatrix"]:
        imatrix_array, _keep = _imatrix_array(Path(job["imatrix"]), overrides)
        params.imatrix = imatrix_array
    if overrides:
        params.kv_overrides = _override_array(overrides)
    if job["tensor_types"]:
        params.tt_overrides = _tensor_type_array([tuple(pair) for pair in job["tensor_types"]])
    llama_cpp.llama_backend_init()
    started, used = time.perf_counter(), time.process_time()
    status = int(llama_cpp.llama_model_quantize(os.fsencode(job["base"]), os.fsencode(job["outfile"]), ctypes.byref(params)))
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    sys.stdout.write(f"{USAGE_MARK} {seconds:.6f} {resident_bytes()} {processor:.6f}\n")
    return status


def main() -> None:
    """Entry point of the child process."""
    # As in `llama_worker`: a GPU's memory is mapped into the address space, all of it.
    limit_process(memory=None if llama_cpp.llama_supports_gpu_offload() else int(sys.argv[2]) or None)
    try:
        status = run(json.loads(sys.argv[1]))
    except QGuardError as error:
        sys.stdout.write(f"failed to quantize: {error}\n")
        status = 1
    sys.stdout.flush()
    sys.exit(0 if status == 0 else 1)


if __name__ == "__main__":
    main()
