"""The way out for models that are not built in: llama.cpp's own converter, run as a child process.

`convert_hf_to_gguf.py` imports the `gguf` package beside it, so it is run by path in a process of its own
(`convert.converter_worker`), never imported. Which one, in this order: `--converter PATH` (the script, or the checkout that has
it), the environment variable `LLAMA_CPP_ROOT` (the checkout), what `qguard-edge converter install` put into the cache.

A model folder is a download, and the converter asks transformers to trust it. So folders with code of their own are refused
before it starts, weights are read from safetensors only, the process has no network, no tokens and a limit on time and memory,
and what it wrote goes through our own reader.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.child import child_command
from convert.gguf_file import GgufModel
from convert.hf.checkpoint import Checkpoint
from convert.hf.installed import SCRIPT, installed, require_sound
from convert.hf.jsonfile import read_json
from convert.hf.plan import BASE_TYPES
from quant_grids.errors import FormatError, QGuardError, UnsupportedError

ROOT_VARIABLE = "LLAMA_CPP_ROOT"
_OUTTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_WITH_DRAFT_HEAD = ("Qwen3NextFor", "Qwen3_5For", "Qwen3_5MoeFor")
_KEPT_LINES = 20
MMPROJ_TYPES = (*BASE_TYPES, "q8_0")
"""Precisions of the vision or audio half of a model."""
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "QGUARD_SERVER_KEY")
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}


class ConverterError(QGuardError):
    """The external converter failed; the message quotes its last lines."""


@dataclass(frozen=True)
class ConverterLimits:
    """What the converter may take.

    Attributes:
        seconds: of time, and of processor time per core.
        memory: bytes of address space, the mapped weights included.
    """

    seconds: int
    memory: int

    @classmethod
    def for_folder(cls, folder: Path) -> ConverterLimits:
        """Ten minutes and one more per GiB; 16 GiB and three times the weights."""
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return cls(600 + 60 * (weights >> 30), (16 << 30) + 3 * weights)


def find_converter(path: Path | None = None, *, with_installed: bool = True) -> Path | None:
    """Finds llama.cpp's converter.

    Args:
        path: What `--converter` was given: the script, or a folder that holds it.
        with_installed: Look at what `qguard-edge converter install` put into the cache, too.

    Returns:
        The script, or None when neither the option nor the environment names one and none is installed.

    Raises:
        UnsupportedError: One of them names a place without the script.
        InstallError: Files of the installed one were changed.
    """
    chosen, origin = path, "--converter"
    if chosen is None:
        root = os.environ.get(ROOT_VARIABLE)
        if not root:
            found = installed()
            return require_sound(found) if with_installed and found.present else None
        chosen, origin = Path(root), ROOT_VARIABLE
    script = chosen / SCRIPT if chosen.is_dir() else chosen
    if not script.is_file():
        raise UnsupportedError(f"{origin} names {chosen}, but there is no {SCRIPT} there.")
    return script.resolve()


def check_trusted(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuses a folder that brings code, or weights that are more than numbers.

    Args:
        folder: The model folder.
        trust_remote_code: Accept Python files, and configurations that name some.

    Raises:
        UnsupportedError: Naming the file and the way out.
    """
    if not any(folder.glob("*.safetensors")):
        raise UnsupportedError(
            f"{folder.name} has no .safetensors files, and other weight files may hold code; convert them first."
        )
    if trust_remote_code:
        return
    way_out = "read it, and pass --trust-remote-code if you trust it"
    for file in sorted(folder.rglob("*.py")):
        raise UnsupportedError(
            f"{folder.name} brings Python code ({file.relative_to(folder)}) that a converter may run; {way_out}."
        )
    for file in sorted(folder.glob("*config*.json")):
        if any(_code_references(read_json(file))):
            raise UnsupportedError(f"{file.name} names Python code (auto_map) that a converter may run; {way_out}.")


def _code_references(value: Any) -> Iterator[bool]:
    if isinstance(value, dict):
        if value.get("auto_map"):
            yield True
        for inner in value.values():
            yield from _code_references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _code_references(inner)


def run_converter(
    script: Path,
    folder: Path,
    outfile: Path,
    *,
    base_type: str | None = None,
    pre: str | None = None,
    guessed_pre: str | None = None,
    trust_remote_code: bool = False,
    mmproj: bool = False,
    limits: ConverterLimits | None = None,
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Makes a base GGUF with llama.cpp's converter.

    Args:
        script: The converter.
        folder: The model folder.
        outfile: The file to write, a temporary one of the caller's.
        base_type: `f32`, `f16`, `bf16`, or None for the checkpoint's own type.
        pre: Pre-tokenizer name to force.
        guessed_pre: Pre-tokenizer name for a tokenizer that the converter does not know.
        trust_remote_code: Let the folder bring code.
        mmproj: Write the vision or audio half instead of the language model; `base_type` may then be `q8_0` too.
        limits: Of the process; None takes those for the folder's size.
        on_line: Called with each line the converter prints.

    Raises:
        ConverterError: It could not be started, failed, took too long, or wrote no GGUF.
        FormatError: What it wrote is not a sound GGUF.
        UnsupportedError: The folder brings code, or `base_type` is none of the three.
    """
    if base_type is not None and base_type not in (MMPROJ_TYPES if mmproj else BASE_TYPES):
        raise UnsupportedError(f"The base type must be one of {', '.join(BASE_TYPES)}, not {base_type!r:.40}.")
    check_trusted(folder, trust_remote_code=trust_remote_code)
    limits = limits or ConverterLimits.for_folder(folder)
    bounds = [str(limits.memory), str(limits.seconds * (os.cpu_count() or 1)), pre or guessed_pre or "", "1" if pre else "0"]
    arguments = [str(folder), "--outfile", str(outfile), "--outtype", base_type or _own_type(folder)]
    if mmproj:
        arguments.append("--mmproj")
    elif _lost_its_draft_head(folder):
        arguments.append("--no-mtp")
    command = child_command("convert.converter_worker", script, *bounds, *arguments)
    status, last = _watch(command, script, limits.seconds, on_line)
    if status != 0:
        shown = " | ".join(line for line in last if line)[-600:]
        raise ConverterError(f"{script.name} failed with exit status {status}: {shown}")
    _check_output(script, outfile)


def _watch(
    command: Sequence[str], script: Path, seconds: int, on_line: Callable[[str], None] | None
) -> tuple[int, Sequence[str]]:
    """Runs the child and reads what it prints: its exit status and its last lines."""
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS} | _OFFLINE
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        )
    except OSError as error:
        raise ConverterError(f"Cannot start {script}: {error.strerror or error}.") from error
    late = threading.Event()

    def stop() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
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
        finally:
            timer.cancel()
    if late.is_set():
        raise ConverterError(f"{script.name} did not finish within {seconds} s and was stopped.")
    return child.returncode, last


def _own_type(folder: Path) -> str:
    """The checkpoint's type in the converter's words; its own guess would turn float32 into float16."""
    try:
        dtypes = {tensor.dtype for tensor in Checkpoint.open(folder).tensors.values() if len(tensor.shape) > 1}
    except QGuardError:
        return "auto"
    return _OUTTYPES.get(dtypes.pop(), "auto") if len(dtypes) == 1 else "auto"


def _lost_its_draft_head(folder: Path) -> bool:
    """Whether the converter would look for layers that predict further tokens and the weights have none.

    transformers leaves these layers out when it loads such a model, and so does every fine-tuned one that it saves.
    """
    try:
        names = Checkpoint.open(folder).tensors
        architectures = str(read_json(folder / "config.json").get("architectures"))
    except QGuardError:
        return False
    return any(kind in architectures for kind in _WITH_DRAFT_HEAD) and not any(name.startswith("mtp.") for name in names)


def _check_output(script: Path, outfile: Path) -> None:
    if not outfile.is_file():
        raise ConverterError(f"{script.name} reported success but did not write {outfile.name}.")
    try:
        model = GgufModel(outfile)
    except FormatError as error:
        raise FormatError(
            f"{script.name} wrote {outfile.name}, but it is not a GGUF file that can be read: {error}"
        ) from error
    if not model.tensors:
        raise FormatError(f"{script.name} wrote {outfile.name}, but it holds no tensors.")
