"""Text to token ids by llama.cpp's own tokenizer, in a child process: the base GGUF is all it needs.

Run as `python -m qguard_edge.runtimes.tokens JOB` it is that child.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qguard_edge.runtimes.llama_child import run_child, tell
from quant_grids.errors import QGuardError


class TokensError(QGuardError):
    """llama.cpp cannot read the model's tokenizer."""


@dataclass(frozen=True)
class Tokens:
    """Tokenized texts.

    Attributes:
        texts: token ids of each text, as the text stands.
        begin: what the model expects before a text; empty for most that have been trained without it.
    """

    texts: tuple[tuple[int, ...], ...]
    begin: tuple[int, ...]


def llama_tokens(model: Path, texts: Sequence[str], *, parse_special: bool = False) -> Tokens:
    """Token ids of texts.

    Args:
        model: GGUF, first shard of a split one.
        texts: any.
        parse_special: read `<|im_start|>` and the like as control tokens.

    Raises:
        TokensError: llama.cpp cannot load the tokenizer.
    """
    with tempfile.TemporaryDirectory() as place:
        job, out = Path(place) / "job.json", Path(place) / "tokens.json"
        content = {"model": str(model), "texts": list(texts), "parse_special": parse_special, "out": str(out)}
        job.write_text(json.dumps(content), encoding="utf-8")
        reason = run_child("qguard_edge.runtimes.tokens", job)
        if reason:
            raise TokensError(f"no tokens from {model.name}: {reason}")
        made = json.loads(out.read_text(encoding="utf-8"))
    return Tokens(tuple(tuple(text) for text in made["texts"]), tuple(made["begin"]))


def _work(job: Path) -> None:
    from qguard_edge.runtimes.llama import LlamaModel

    content = json.loads(job.read_text(encoding="utf-8"))
    with LlamaModel(Path(content["model"]), vocab_only=True) as model:
        special = content["parse_special"]
        texts = [tuple(model.tokenize(text, parse_special=special)) for text in content["texts"]]
        # What llama.cpp puts before a text, told from one that it tokenizes with and without.
        bare, whole = model.tokenize("a"), model.tokenize("a", add_special=True)
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        made = Tokens(tuple(texts), tuple(whole[:start]))
    Path(content["out"]).write_text(json.dumps(dataclasses.asdict(made)), encoding="utf-8")


def main() -> None:
    """Entry point of the child process."""
    try:
        _work(Path(sys.argv[1]))
    except QGuardError as error:
        tell(error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
