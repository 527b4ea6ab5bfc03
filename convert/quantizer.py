"""The plain file: what an unprotected user would have shipped, made by llama.cpp itself.

`llama_model_quantize` blocks, cannot be cancelled and may abort the whole process on a broken model, so it runs in a child
process (`convert.quantize_worker`). The child's log lines come back through a pipe and are read here: one line per tensor
for the progress bar, and the warnings about tensors whose shape does not allow the wanted type.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from convert.child import Silence, child_command
from convert.cores import available_cores
from convert.ftypes import FileType
from convert.gguf_file import GgufModel
from convert.llama_limits import SECONDS_VARIABLE, ChildLimits
from quant_grids.errors import FormatError, QGuardError, UnsupportedError
from quant_grids.ggml_type import type_named


class QuantizeError(QGuardError):
    """llama.cpp could not quantize the model; the message quotes its reason."""


@dataclass(frozen=True)
class QuantizeOptions:
    """What `llama-quantize` calls by the same names.

    Attributes:
        file_type: the target.
        threads: worker threads, 0 for all cores.
        imatrix: importance matrix file, either format.
        tensor_types: `(regex, ggml type name)` pairs, first match wins.
        output_tensor_type: ggml type name for `output.weight`.
        token_embedding_type: ggml type name for the token embeddings.
        pure: no mixture.
        leave_output_tensor: keep `output.weight` as it is.
        override_kv: `KEY=TYPE:VALUE` strings.
        allow_requantize: accept a base that is already quantized.
    """

    file_type: FileType
    threads: int = 0
    imatrix: Path | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    leave_output_tensor: bool = False
    override_kv: tuple[str, ...] = ()
    allow_requantize: bool = False

    def check(self) -> None:
        """Refuse malformed options before anything runs.

        Raises:
            UnsupportedError: naming the option, what was given and what it takes.
        """
        for pattern, type_name in self.tensor_types:
            ggml_type_number(type_name, "--tensor-type")
            try:
                re.compile(pattern)
            except re.error as error:
                raise UnsupportedError(
                    f"--tensor-type {pattern}={type_name}: the pattern is not a regular expression ({error})"
                ) from error
        for value, option in (
            (self.output_tensor_type, "--output-tensor-type"),
            (self.token_embedding_type, "--token-embedding-type"),
        ):
            if value is not None:
                ggml_type_number(value, option)
        for text in self.override_kv:
            parse_override(text)


@dataclass(frozen=True)
class Fallback:
    """A tensor whose row length does not allow the type the mixture wanted."""

    tensor: str
    columns: int
    wanted: str
    got: str


@dataclass(frozen=True)
class PlannedTensor:
    """What llama.cpp decided for one tensor (from its log): types in its own spelling, sizes in MiB."""

    name: str
    source_type: str
    target_type: str
    mib_before: float
    mib_after: float


@dataclass(frozen=True)
class QuantizeReport:
    """What llama.cpp did, or would do.

    Attributes:
        tensors: one entry each, in llama.cpp's order.
        fallbacks: tensors that got another type than wanted.
        warnings: one sentence each.
        seconds: wall time of `llama_model_quantize` alone, without starting the child.
        peak_rss_bytes: largest resident size of the child.
        processor: seconds of all its threads in `llama_model_quantize`.
    """

    tensors: tuple[PlannedTensor, ...]
    fallbacks: tuple[Fallback, ...]
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    processor: float = 0.0


ProgressCallback = Callable[[int, int, str], None]
"""Called with (tensors done, tensors in all, tensor name)."""

_STARTED = re.compile(r"\[\s*(\d+)/\s*(\d+)\] (\S+)\s+- \[[^\]]*\], type =\s*(\S+?),")
_SIZE = re.compile(r"size =\s*([\d.]+) MiB(?: ->\s*([\d.]+) MiB)?(?: \((\S+)\))?")
_CONVERTING = re.compile(r"converting to (\S+) \.\.")
_FALLBACK = re.compile(
    r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+\d+ \(required for type\s+(\S+)\).*-> falling back to\s+(\S+)"
)
_NO_IMATRIX = re.compile(r"did not find weights for (\S+)")
_ERROR = re.compile(r"failed to quantize: (.+)$")
BYTES_A_WEIGHT = 16
"""Of the largest tensor: its numbers in f32, what they become, and as much again."""
SECONDS_A_WEIGHT = 1e-5
"""Of the largest tensor, during which llama.cpp gives no sign of life: slow types take one thread long."""
USAGE_MARK = "@qguard-usage"
"""Starts the child's own line: seconds in `llama_model_quantize`, peak resident size in bytes, seconds of the processor."""


def ggml_type_number(name: str, option: str) -> int:
    """Number of a ggml type by its name, any case.

    Raises:
        UnsupportedError: no such type.
    """
    try:
        return int(type_named(name))
    except FormatError as error:
        raise UnsupportedError(f"{option}: {error}") from None


def check_tensor_types(options: QuantizeOptions, names: Iterable[str], file: str) -> None:
    """Refuse a `--tensor-type` whose pattern matches no tensor: a slip that llama.cpp passes over in silence.

    Args:
        options: with the patterns; llama.cpp looks for each anywhere in a name.
        names: of the tensors.
        file: the model's, for the message.

    Raises:
        UnsupportedError: naming the pattern.
    """
    known = list(names)
    for pattern, type_name in options.tensor_types:
        if not any(re.search(pattern, name) for name in known):
            raise UnsupportedError(
                f"--tensor-type {pattern}={type_name}: no tensor of {file} has a name that matches; `qguard-edge inspect "
                "--tensors` lists the names"
            )


def parse_tensor_type(text: str) -> tuple[str, str]:
    """Split a `--tensor-type` value RE=TYPE; the pattern is lower-cased as llama-quantize does.

    Raises:
        UnsupportedError: no `=`, or an empty side.
    """
    pattern, sign, type_name = text.partition("=")
    if not sign or not pattern or not type_name:
        raise UnsupportedError(f"--tensor-type {text!r}: give PATTERN=TYPE, for example ffn_down=q6_k")
    ggml_type_number(type_name, "--tensor-type")
    return pattern.lower(), type_name


def parse_override(text: str) -> tuple[str, str, str]:
    """Split an `--override-kv` value into key, type and value text.

    Raises:
        UnsupportedError: it is not KEY=TYPE:VALUE with a type llama.cpp knows.
    """
    key, sign, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    hint = "give KEY=TYPE:VALUE with TYPE one of int, float, bool, str"
    if not sign or not colon or kind not in ("int", "float", "bool", "str"):
        raise UnsupportedError(f"--override-kv {text!r}: {hint}")
    if not 0 < len(key.encode()) < 128 or len(value.encode()) > 127:
        raise UnsupportedError(f"--override-kv {text!r}: llama.cpp takes keys and values of at most 127 bytes")
    try:
        if kind == "int":
            int(value)
        elif kind == "float":
            float(value)
    except ValueError:
        raise UnsupportedError(f"--override-kv {text!r}: {value!r} is not a value of type {kind}") from None
    if kind == "bool" and value not in ("true", "false"):
        raise UnsupportedError(f"--override-kv {text!r}: a bool is true or false")
    return key, kind, value


def quantize(
    base: Path,
    outfile: Path,
    options: QuantizeOptions,
    *,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> QuantizeReport:
    """Run `llama_model_quantize` in a child process.

    Args:
        base: full-precision GGUF (first shard of a split one).
        outfile: where the plain file goes; not written with `dry_run`.
        options: see `QuantizeOptions`.
        dry_run: only report what would be done.
        progress: called once per tensor.

    Returns:
        What llama.cpp reported.

    Raises:
        QuantizeError: llama.cpp failed; nothing is left at `outfile`.
        FormatError: the base is not a sound GGUF.
    """
    options.check()
    job = asdict(options) | {
        "file_type": options.file_type.number,
        "imatrix": str(options.imatrix) if options.imatrix else None,
        "base": str(base),
        "outfile": str(outfile),
        "dry_run": dry_run,
    }
    limits = limits_of(base, options.threads or available_cores())
    command = child_command("convert.quantize_worker", json.dumps(job), str(limits.memory or 0))
    parser = _LogParser(progress)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as child:
        silence = Silence(child, limits.seconds)
        try:
            assert child.stdout is not None
            for raw in child.stdout:
                silence.broken()
                parser.feed(raw.decode("utf-8", "replace"))
            code = child.wait()
        except BaseException:
            child.kill()
            outfile.unlink(missing_ok=True)
            raise
        finally:
            silence.end()
    if code != 0:
        if not dry_run:
            outfile.unlink(missing_ok=True)
        reason = parser.reason(code)
        if silence.expired:
            reason = (
                f"it was stopped after {limits.seconds:.0f} s without a sign of life; {SECONDS_VARIABLE} sets that limit"
            )
        if "imatrix" in reason or "importance matrix" in reason:
            raise QuantizeError(
                f"{options.file_type.name} needs an importance matrix: pass --imatrix FILE, made by llama-imatrix or by "
                f"`qguard-edge imatrix MODEL --text FILE` (llama.cpp: {reason})"
            )
        raise QuantizeError(f"llama.cpp could not quantize {base.name} to {options.file_type.name}: {reason}")
    return parser.report()


def limits_of(base: Path, threads: int) -> ChildLimits:
    """What llama.cpp may take to quantize a file: more memory and time the larger its largest tensor is.

    Args:
        base: first shard of a split one.
        threads: of llama.cpp.

    Raises:
        FormatError: it is not a sound GGUF.
        LlamaRuntimeError: a variable of the environment is no number.
    """
    largest = max((tensor.n_weights for tensor in GgufModel(base).tensors.values()), default=0)
    return ChildLimits.of(base, threads=threads, more=BYTES_A_WEIGHT * largest, longer=SECONDS_A_WEIGHT * largest)


class _LogParser:
    """Reads the child's log lines; one tensor may be spread over several of them."""

    def __init__(self, progress: ProgressCallback | None) -> None:
        self.progress = progress
        self.tensors: list[PlannedTensor] = []
        self.fallbacks: list[Fallback] = []
        self.warnings: list[str] = []
        self.error = ""
        self.last_lines: list[str] = []
        self.usage = (0.0, 0, 0.0)
        self._open: tuple[str, str] | None = None
        self._target = ""

    def feed(self, line: str) -> None:
        line = line.rstrip()
        if line.startswith(USAGE_MARK):
            _, seconds, peak, processor = line.split()
            self.usage = (float(seconds), int(peak), float(processor))
            return
        if line:
            self.last_lines = [*self.last_lines[-3:], line]
        if match := _FALLBACK.search(line):
            self.fallbacks.append(Fallback(match[1], int(match[2]), match[3].upper(), match[4].upper()))
        if match := _NO_IMATRIX.search(line):
            self.warnings.append(f"the importance matrix has no entry for {match[1]}")
        if match := _ERROR.search(line):
            self.error = match[1]
        if match := _STARTED.search(line):
            self._open = (match[3], match[4])
            self._target = ""
            if self.progress:
                self.progress(int(match[1]), int(match[2]), match[3])
        if match := _CONVERTING.search(line):
            self._target = match[1]
        if self._open and (match := _SIZE.search(line)):
            name, source = self._open
            target = match[3] or self._target or source
            before = float(match[1])
            self.tensors.append(
                PlannedTensor(name, source.upper(), target.upper(), before, float(match[2]) if match[2] else before)
            )
            self._open = None

    def reason(self, code: int) -> str:
        """llama.cpp's own words, or how the child died."""
        if self.error:
            return self.error
        if code < 0:
            return f"it was stopped by signal {-code}"
        return " / ".join(self.last_lines[-2:]) or f"exit status {code}"

    def report(self) -> QuantizeReport:
        return QuantizeReport(tuple(self.tensors), tuple(self.fallbacks), tuple(self.warnings), *self.usage)
