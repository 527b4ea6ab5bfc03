"""The load check: open a finished GGUF in llama.cpp and decode a few tokens, in a child process.

A broken file can make llama.cpp abort; in a child that is an exit status, not the end of the conversion.

Run as `python -m qguard_edge.runtimes.load_check FILE PROMPT COUNT`: prints one JSON object, `{"tokens": [...], "text": "..."}`.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from convert.child import child_command
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
    command = child_command("qguard_edge.runtimes.load_check", path, prompt, str(count), str(threads))
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()
        why = reason[-1] if reason else f"it was stopped by signal {-done.returncode}"
        raise LoadCheckError(f"llama.cpp cannot use the file that was made: {why}")
    answer = json.loads(done.stdout)
    return LoadCheck(prompt, answer["text"], tuple(answer["tokens"]))


def main(arguments: list[str]) -> int:
    """Entry point of the child process; returns the exit status."""
    from qguard_edge.runtimes.llama import LlamaModel

    path, prompt, count, threads = arguments
    try:
        with LlamaModel(Path(path), n_ctx=128, n_threads=int(threads) or None) as model:
            tokens = model.tokenize(prompt, add_special=True)[:64] or [0]
            answer = model.greedy(tokens, int(count))
            text = model.detokenize(answer)
    except QGuardError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps({"tokens": answer, "text": text}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
