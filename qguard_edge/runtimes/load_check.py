"""The load check: open a finished GGUF in llama.cpp and decode a few tokens, in a child process as always."""

from dataclasses import dataclass
from pathlib import Path

from convert.llama_limits import ChildLimits, LlamaRuntimeError
from quant_grids.errors import QGuardError

PROMPT = "The capital of France is"
TOKENS = 10


class LoadCheckError(QGuardError):
    """llama.cpp could not load the file or decode with it."""


@dataclass(frozen=True)
class LoadCheck:
    """What the file answered.

    Attributes:
        prompt: the text that was continued.
        text: greedy continuation.
        tokens: its token ids; fewer than requested when the model ended the text.
        halves: what its other file adds, vision or audio, where it was loaded with one.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    halves: tuple[str, ...] = ()


def load_check(path: Path, *, prompt: str = PROMPT, count: int = TOKENS, threads: int = 0) -> LoadCheck:
    """Load a GGUF in llama.cpp and continue a prompt greedily.

    Raises:
        LoadCheckError: it does not load, or does not decode; the message quotes llama.cpp.
    """
    from qguard_edge.runtimes.llama import LlamaModel

    try:
        with LlamaModel(path, n_ctx=128, n_threads=threads or None) as model:
            tokens = model.tokenize(prompt, add_special=True)[:64] or [0]
            answer = model.greedy(tokens, count)
            return LoadCheck(prompt, model.detokenize(answer), tuple(answer))
    except LlamaRuntimeError as error:
        raise LoadCheckError(f"llama.cpp cannot use the file that was made: {error}") from error


def load_pair(model: Path, mmproj: Path) -> tuple[str, ...]:
    """Load a GGUF and its vision or audio half in llama.cpp's multimodal library.

    Args:
        model: the language half.
        mmproj: the other one.

    Returns:
        What the pair takes beside text: vision, audio, or both.

    Raises:
        LoadCheckError: the two do not load, or not together; the message quotes llama.cpp.
    """
    from qguard_edge.runtimes.llama_child import run_child

    halves: list[str] = []
    limits = ChildLimits.of(model, more=2.0 * mmproj.stat().st_size)
    reason = run_child(
        "qguard_edge.runtimes.mtmd_worker",
        model,
        mmproj,
        limits=limits,
        on_event=lambda event: halves.extend(event["halves"]),
    )
    if reason:
        raise LoadCheckError(f"llama.cpp cannot use {mmproj.name} with the model: {reason}")
    return tuple(halves)
