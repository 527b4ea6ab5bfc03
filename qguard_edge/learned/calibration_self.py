"""Text that the full-precision model writes itself, in answer to the seed prompts; kept in the cache."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convert.cache import cache_folder
from convert.scratch import shared_path
from qguard_edge.runtimes.hf import HfTokenizer
from qguard_edge.verify.chat import ChatTemplate, render_conversations

if TYPE_CHECKING:
    from qguard_edge.progress import Progress
    from qguard_edge.runtimes.hf import HfModel

SEED_PROMPTS = Path(__file__).resolve().parent.parent / "data" / "seed_prompts.txt"
_VERSION = 1  # of how the text is made: part of the cache's key


def self_written(model: "HfModel", model_key: str, count: int, length: int, progress: "Progress | None") -> Sequence[str]:
    """Texts by the model, from the cache or written now. Always from the same seed: one model, one text.

    Args:
        model: full precision.
        model_key: identifies it for the cache.
        count: of the texts.
        length: tokens of each, prompt included, at most.
        progress: told about text being written.
    """
    prompts = SEED_PROMPTS.read_text(encoding="utf-8").splitlines()
    wanted = [prompts[i % len(prompts)] for i in range(count)]
    settings = [_VERSION, model_key, count, length, wanted, model.template_key]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    path = cache_folder("calibration") / f"{key}.json"
    if path.is_file():
        try:
            texts = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
                return texts
        except ValueError:
            pass  # half a file from a machine that went down: write it again
    texts = model.write_texts(asked_prompts(model, wanted), length, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    with shared_path(path) as temporary:
        temporary.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    return texts


def asked_prompts(model: "HfModel", prompts: Sequence[str]) -> list[str]:
    """Prompts as the model's chat template writes them, rendered away from this process and within limits."""
    if not model.template_key:
        return [f"{prompt}\n\n" for prompt in prompts]
    tokenizer = HfTokenizer(model.tokenizer)
    template = ChatTemplate(str(model.tokenizer.get_chat_template()), tokenizer.begin, tokenizer.end)
    return render_conversations(template, [[("user", prompt)] for prompt in prompts], ask=True)
