"""The home of transformers for everything but the lab's model making: load a model to run it on text."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convert.reading import check_folder, require_file
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.runtimes.devices import autocast
from quant_grids.errors import QGuardError

WRITING_SEED = 20260101
WRITING_BATCH = 32


class HfLoadError(QGuardError):
    """transformers cannot load the model."""


@dataclass(frozen=True)
class HfModel:
    """A causal language model in evaluation mode, and its tokenizer.

    Attributes:
        model: a transformers model.
        tokenizer: its tokenizer.
        architecture: `model_type` of its config.
        layers: number of decoder blocks.
    """

    model: Any
    tokenizer: Any
    architecture: str
    layers: int

    @property
    def template_key(self) -> str:
        """The chat template, or nothing: it decides what a rendered conversation is."""
        return str(getattr(self.tokenizer, "chat_template", None) or "")

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; `special`: with what the tokenizer puts around plain text (a beginning-of-text token, for most)."""
        return [int(i) for i in self.tokenizer(text, add_special_tokens=special)["input_ids"]]

    def write_texts(self, prompts: Sequence[str], length: int, progress: Progress | None = None) -> list[str]:
        """Let the model answer prompts: sampled at temperature 1, the same texts each time.

        Args:
            prompts: as its chat template writes them, up to where the answer begins.
            length: of prompt and answer, in tokens, at most.
            progress: told about the texts.

        Returns:
            Prompt and answer.
        """
        progress = progress or NoProgress()
        progress.stage("The model writes its calibration text", len(prompts), "texts")
        device = self.model.device
        pad = self.tokenizer.pad_token_id
        pad = int(self.tokenizer.eos_token_id or 0) if pad is None else int(pad)
        texts: list[str] = []
        state = torch.random.get_rng_state()
        torch.manual_seed(WRITING_SEED)
        try:
            for start in range(0, len(prompts), WRITING_BATCH):
                asked = [
                    self.encode(prompt, special=not self.template_key) for prompt in prompts[start : start + WRITING_BATCH]
                ]
                longest = max(map(len, asked))
                ids = torch.tensor([[pad] * (longest - len(row)) + row for row in asked], device=device)
                mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in asked], device=device)
                with torch.inference_mode(), autocast(device):
                    made = self.model.generate(
                        input_ids=ids,
                        attention_mask=mask,
                        max_new_tokens=max(8, length - longest),
                        do_sample=True,
                        temperature=1.0,
                        top_k=0,
                        top_p=1.0,
                        pad_token_id=pad,
                    )
                for row, answer in zip(asked, made[:, longest:].tolist(), strict=True):
                    while answer and answer[-1] == pad:
                        answer.pop()
                    texts.append(str(self.tokenizer.decode([*row, *answer], skip_special_tokens=False)))
                progress.advance(len(asked))
        finally:
            torch.random.set_rng_state(state)
        return texts


def decoder_blocks(model: Any) -> Any:
    """The list of decoder blocks of a transformers model.

    Raises:
        HfLoadError: it has none that can be distinguished.
    """
    wanted = int(model.config.num_hidden_layers)
    for _, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted:
            return module
    raise HfLoadError(f"{model.config.model_type} has no list of decoder blocks; use --quantguard-scope model")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def require_sound(path: Path) -> None:
    """Hold a model against `convert.reading`'s rule before transformers opens it.

    Raises:
        FormatError: a file of it is a link that leads out of the folder, a FIFO or a device.
        HfLoadError: there is none.
    """
    if path.is_dir():
        check_folder(path)
    elif path.exists():
        require_file(path)
    else:  # transformers would take the path for a hub id
        raise HfLoadError(f"there is no model at {path}")


def load_hf_model(
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> HfModel:
    """Load a Hugging Face folder, or a full-precision GGUF of an architecture that transformers reads.

    Args:
        path: folder or .gguf file.
        dtype: of the weights in memory.
        device: where to put them; default CPU.
        trust_remote_code: run the Python code that a folder brings, in this process.

    Raises:
        HfLoadError: transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    require_sound(path)
    where = _where(path)
    # A pickle beside the weights would be another model than the one converted.
    weights: dict[str, Any] = {} if path.is_file() else {"use_safetensors": True}
    try:
        with quiet():
            trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
            tokenizer = AutoTokenizer.from_pretrained(**where, **trust)
            model = AutoModelForCausalLM.from_pretrained(**where, **weights, **trust, dtype=dtype)
    except Exception as error:  # whatever a config of foreign origin makes it raise
        raise HfLoadError(f"transformers cannot load {path.name}: {first_line(error)}") from error
    model = model.eval().to(device or torch.device("cpu"))
    return HfModel(model, tokenizer, str(model.config.model_type), int(model.config.num_hidden_layers))


def check_hf_model(path: Path, *, trust_remote_code: bool = False) -> None:
    """Read a model's settings alone, to see whether `load_hf_model` knows its architecture.

    Raises:
        HfLoadError: it does not.
    """
    from transformers import AutoConfig

    require_sound(path)
    try:
        with quiet():
            AutoConfig.from_pretrained(**_where(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a config of foreign origin makes it raise
        raise HfLoadError(f"transformers cannot load {path.name}: {first_line(error)}") from error


def _where(path: Path) -> dict[str, Any]:
    """A folder or a GGUF as transformers wants it named."""
    if path.is_file():
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": path}


@dataclass(frozen=True)
class HfTokenizer:
    """A folder's tokenizer in the verifier's words (`qguard_edge.verify.subjects.Vocabulary`).

    Attributes:
        tokenizer: of transformers.
    """

    tokenizer: Any

    @property
    def template(self) -> str:
        """The chat template; empty where there is none."""
        found = getattr(self.tokenizer, "chat_template", None)
        return found if isinstance(found, str) else ""

    @property
    def begin(self) -> str:
        """The token a text begins with, as text."""
        return str(self.tokenizer.bos_token or "")

    @property
    def end(self) -> str:
        """The token a text ends with, as text."""
        return str(self.tokenizer.eos_token or "")

    @property
    def fingerprint(self) -> str:
        """Two tokenizers with the same one give the same ids."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return str(backend.to_str()) if backend is not None else str(sorted(self.tokenizer.get_vocab().items()))

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """See `Vocabulary.tokenize`."""
        found = self.tokenizer(text, add_special_tokens=add_special, split_special_tokens=not parse_special)
        return [int(token) for token in found["input_ids"]]

    def detokenize(self, tokens: Sequence[int]) -> str:
        """See `Vocabulary.detokenize`."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def load_tokenizer(folder: Path) -> HfTokenizer:
    """The tokenizer of a folder.

    Raises:
        HfLoadError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    require_sound(folder)
    try:
        with quiet():
            return HfTokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # whatever a config of foreign origin makes it raise
        raise HfLoadError(f"transformers cannot load the tokenizer of {folder.name}: {first_line(error)}") from error


def end_tokens(model: Any, tokenizer: HfTokenizer) -> frozenset[int]:
    """Tokens that end an answer: those of the generation settings, and the tokenizer's own."""
    found = getattr(model.generation_config, "eos_token_id", None)
    listed = found if isinstance(found, list) else [found]
    return frozenset(int(token) for token in (*listed, tokenizer.tokenizer.eos_token_id) if token is not None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal; errors are raised as ever."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
