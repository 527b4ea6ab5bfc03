"""The way out for models that are not built in: llama.cpp's own converter, run as a child process.

`convert_hf_to_gguf.py` belongs to a llama.cpp checkout and imports the `gguf` package beside it, so it is run by path
with this Python, never imported. Which one is the user's choice, in this order: `--converter PATH` (the script, or
the checkout that has it), then the environment variable `LLAMA_CPP_ROOT` (the checkout).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from convert.hf.checkpoint import Checkpoint
from convert.hf.plan import BASE_TYPES
from quant_grids.errors import FormatError, QGuardError, UnsupportedError

SCRIPT = "convert_hf_to_gguf.py"
ROOT_VARIABLE = "LLAMA_CPP_ROOT"
_OUTTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_KEPT_LINES = 20


class ConverterError(QGuardError):
    """The external converter failed; the message quotes its last lines."""


def find_converter(path: Path | None = None) -> Path | None:
    """Finds llama.cpp's converter.

    Args:
        path: What `--converter` was given: the script, or a folder that holds it.

    Returns:
        The script, or None when neither the option nor the environment names one.

    Raises:
        UnsupportedError: One of them names a place without the script.
    """
    chosen, origin = path, "--converter"
    if chosen is None:
        root = os.environ.get(ROOT_VARIABLE)
        if not root:
            return None
        chosen, origin = Path(root), ROOT_VARIABLE
    script = chosen / SCRIPT if chosen.is_dir() else chosen
    if not script.is_file():
        raise UnsupportedError(f"{origin} names {chosen}, but there is no {SCRIPT} there.")
    return script.resolve()


def run_converter(
    script: Path,
    folder: Path,
    outfile: Path,
    *,
    base_type: str | None = None,
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Makes a base GGUF with llama.cpp's converter.

    Args:
        script: The converter.
        folder: The model folder.
        outfile: The file to write, a temporary one of the caller's.
        base_type: `f32`, `f16`, `bf16`, or None for the checkpoint's own type.
        on_line: Called with each line the converter prints.

    Raises:
        ConverterError: It could not be started, failed, or wrote no GGUF.
        UnsupportedError: `base_type` is none of the three.
    """
    if base_type is not None and base_type not in BASE_TYPES:
        raise UnsupportedError(f"The base type must be one of {', '.join(BASE_TYPES)}, not {base_type!r:.40}.")
    command = [sys.executable, str(script), str(folder), "--outfile", str(outfile)]
    command += ["--outtype", base_type or _own_type(folder)]
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise ConverterError(f"Cannot start {script}: {error.strerror or error}.") from error
    with child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                last.append(line.rstrip())
                if on_line:
                    on_line(line.rstrip())
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        shown = " | ".join(line for line in last if line)[-600:]
        raise ConverterError(f"{script.name} failed with exit status {child.returncode}: {shown}")
    _check_output(script, outfile)


def _own_type(folder: Path) -> str:
    """The checkpoint's type in the converter's words; its own guess would turn float32 into float16."""
    try:
        dtypes = {tensor.dtype for tensor in Checkpoint.open(folder).tensors.values() if len(tensor.shape) > 1}
    except QGuardError:
        return "auto"
    return _OUTTYPES.get(dtypes.pop(), "auto") if len(dtypes) == 1 else "auto"


def _check_output(script: Path, outfile: Path) -> None:
    try:
        with outfile.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ConverterError(f"{script.name} reported success but did not write {outfile.name}.") from error
    if magic != b"GGUF":
        raise FormatError(f"{script.name} wrote {outfile.name}, but it is not a GGUF file.")
