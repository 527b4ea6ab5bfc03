"""The load check: open a finished GGUF in llama.cpp and decode a few tokens, in a child process as always."""

from dataclasses import dataclass
from pathlib import Path

from qguard_edge.runtimes.llama_limits import LlamaRuntimeError
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
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]


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
