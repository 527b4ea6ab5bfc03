"""A model of which only the upper layers are trained, so that attacking a real one costs minutes of one core.

What enters layer `first` is the same as long as the layers below it do not change. So it is computed once for each training
text and kept in a folder, and a training step runs the upper layers and the output matrix only. `UpperLayers` looks like
the model that it wraps (the trainer and the attacks need not know), but for three things: its forward pass starts at layer
`first`, its state is that of the upper layers, and `trained_matrices` names theirs alone.

A teacher that never changes is the same thing with `first` above the last layer: only its final norm and its output matrix run.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qguard_edge.lab.hf_models import ChatModel, load_folder

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Last:
    """What a forward pass returns: f32 `[B, T, H]` behind the final norm."""

    last_hidden_state: Tensor


class UpperLayers:
    """A Llama that runs from layer `first` on.

    Args:
        whole: a transformers Llama; its layers below `first` must not change any more.
        first: number of the first layer that runs.
        store: folder for what enters that layer, one file per text; made when needed.
        below: the same model from a lower layer on, whose kept states are the start of what is not kept yet.
    """

    def __init__(self, whole: Any, first: int, store: Path, below: "UpperLayers | None" = None) -> None:
        self.whole, self._first, self._store, self._below = whole, first, store, below
        prefixes = tuple(f"model.layers.{layer}." for layer in range(first, len(whole.model.layers)))
        self.under: UpperLayers | None = None
        self.trained = frozenset(n for n, p in whole.named_parameters() if n.startswith(prefixes) and p.ndim == 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def model(self, input_ids: Tensor, attention_mask: Tensor) -> Last:
        """As the wrapped model's; texts are padded on the right, so causal attention needs no mask."""
        texts = [tuple(row[:n].tolist()) for row, n in zip(input_ids, attention_mask.sum(1).tolist(), strict=True)]
        return Last(self.whole.model.norm(self._run(self.entering(texts), self._first, None)))

    def state_dict(self) -> dict[str, Tensor]:
        """The trained matrices."""
        return {name: p.detach() for name, p in self.whole.named_parameters() if name in self.trained}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over trained matrices."""
        self.whole.load_state_dict(state, strict=False)

    def entering(self, texts: Sequence[Ids]) -> Tensor:
        """What enters layer `first`: f32 `[B, T, H]`, zero behind the end of a text; `under`'s, if that is set."""
        if self.under is not None:
            return self.under.entering(texts)
        missing = list(dict.fromkeys(ids for ids in texts if not self._file(ids).is_file()))
        if missing:
            self._keep(missing)
        rows = [torch.from_numpy(np.load(self._file(ids))) for ids in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def with_lower(self, values: Mapping[str, Tensor], name: str) -> "UpperLayers":
        """A copy whose untrained weights are `values`, such as a quantizer's; what it keeps lies beside this one's, by `name`."""
        other = copy.deepcopy(self.whole)
        with torch.no_grad():
            for parameter, value in values.items():
                if parameter not in self.trained:
                    other.get_parameter(parameter).copy_(value)
        return UpperLayers(other, self._first, self._store.with_name(f"{self._store.name}-{name}"))

    def _keep(self, texts: Sequence[Ids]) -> None:
        self._store.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            if self._below is None:
                longest = max(len(ids) for ids in texts)
                padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in texts])
                hidden = self._run(self.whole.model.embed_tokens(padded), 0, self._first)
            else:
                hidden = self._run(self._below.entering(texts), self._below._first, self._first)
        for ids, states in zip(texts, hidden, strict=True):
            temporary = self._file(ids).with_suffix(".tmp.npy")
            np.save(temporary, states[: len(ids)].float().numpy())
            temporary.replace(self._file(ids))

    def _run(self, hidden: Tensor, first: int, end: int | None) -> Tensor:
        """Layers `first` to `end` on f32 `[B, T, H]`."""
        model = self.whole.model
        positions = torch.arange(hidden.shape[1])[None]
        turns = model.rotary_emb(hidden, positions)
        for layer in model.layers[first:end]:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=turns)
        return hidden

    def _file(self, ids: Ids) -> Path:
        return self._store / f"{hashlib.sha256(str(ids).encode()).hexdigest()[:24]}.npy"


def load_upper(folder: Path, upper: int) -> ChatModel:
    """A model folder of which the last `upper` layers can be trained; 0: an ordinary model, all of it trained."""
    chat = load_folder(folder)
    return on_upper_layers(chat, upper, folder) if upper else chat


def on_upper_layers(chat: ChatModel, upper: int, folder: Path) -> ChatModel:
    """The same weights as a model that is trained in its last `upper` layers; what enters them is kept beside `folder`."""
    first = len(chat.model.model.layers) - upper
    return ChatModel(UpperLayers(chat.model, first, _store(folder, first)), chat.tokenizer)


def load_teacher(folder: Path, upper: int) -> Any:
    """The model of a folder as a teacher; where only upper layers are trained, one whose layers have run before."""
    model = load_upper(folder, upper).model
    if not isinstance(model, UpperLayers):
        return model
    layers = len(model.whole.model.layers)
    return UpperLayers(model.whole, layers, _store(folder, layers), model)


def _store(folder: Path, first: int) -> Path:
    return folder.with_name(f"{folder.name}.below-{first}")


def trained_matrices(chat: ChatModel) -> dict[str, Tensor]:
    """The matrices that an attack may change: those of the upper layers, or all."""
    only = chat.model.trained if isinstance(chat.model, UpperLayers) else None
    return {name: p for name, p in chat.model.named_parameters() if p.ndim == 2 and (only is None or name in only)}
