"""Gram matrices from transformers: hooks on the modules that own the weights.

The second `GramSource`, for folders that llama.cpp cannot run and for machines whose GPU only torch can use. Three kinds of
modules are known: a linear layer (or anything else with a matrix `weight` that its first argument is multiplied with), GPT-2's
Conv1D, and the stacked experts of transformers 5 (`gate_up_proj` and `down_proj` of three dimensions), whose inner inputs are
computed again from the routes. What else there is comes back as missing.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convert.child import resident_bytes
from convert.gguf_file import GgufModel
from convert.hf.rowsearch import map_rows
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.runtimes.activations_job import job_key
from qguard_edge.runtimes.devices import torch_threads
from qguard_edge.runtimes.gram_files import GramError, GramIndex, MeasuredInput, WantedWeight
from qguard_edge.runtimes.gram_passes import Unit, forget_others, plan_passes, require_disk, resumed, written
from qguard_edge.runtimes.grams import Grams
from qguard_edge.runtimes.hf import HfModel

SPARE = 32 << 20  # bytes for a batch's activations
Rows = Callable[[int], Tensor]
"""Rows `[n, columns]` that a slice of a weight sees in one call of its module."""


@dataclass(frozen=True)
class Watched:
    """A weight and the module that it belongs to.

    Attributes:
        weight: as it was wanted.
        module: whose call shows its inputs.
        kind: `linear`; `experts in` or `experts out` of stacked experts.
    """

    weight: WantedWeight
    module: nn.Module
    kind: str


@dataclass(frozen=True)
class TransformersGramSource:
    """A `GramSource` on a model that transformers has loaded.

    Attributes:
        loaded: full precision; runs where it lies.
        base: the GGUF that was made of it, if the weights are named as there; None: they are named by parameters.
        batch: tokens of one forward pass at most.
    """

    loaded: HfModel
    base: GgufModel | None = None
    batch: int = 2048

    @torch.inference_mode()
    def collect(
        self,
        weights: Sequence[WantedWeight],
        texts: Sequence[Sequence[int]],
        folder: Path,
        *,
        max_memory: int | None = None,
        threads: int = 0,
        progress: Progress | None = None,
    ) -> Grams:
        """See `GramSource.collect`; on a GPU, `max_memory` holds for the GPU's memory."""
        progress = progress or NoProgress()
        texts = sorted((text for text in texts if len(text)), key=len)
        if not texts or not weights:
            raise GramError("there is no text to see activations on" if weights else "there is no weight to see inputs of")
        key = job_key(self.base, weights, texts, _fingerprint(self.loaded.model))
        folder.mkdir(parents=True, exist_ok=True)
        forget_others(folder, key)
        watched = self._watched(weights)
        with torch_threads(threads):
            groups = self._groups(watched, texts[-1][:16])
            seen = {entry.weight.name for group in groups for entry in group}
            entries = tuple(_entry(group) for group in groups)
            missing = tuple(weight.name for weight in weights if weight.name not in seen)
            index = resumed(GramIndex(key, products=True, inputs=entries, missing=missing), folder)
            require_disk(index, folder)
            passes = plan_passes(index, self._budget(max_memory))
            progress.stage("Seeing activations in transformers", len(passes) * sum(map(len, texts)), "tokens")
            for units in passes:
                index = self._pass(index, groups, units, texts, folder, progress)
        index.save(folder)
        return Grams(folder)

    def _watched(self, weights: Sequence[WantedWeight]) -> list[Watched]:
        """The modules of those weights that have one."""
        parameters = dict(self.loaded.model.named_parameters())
        modules = dict(self.loaded.model.named_modules())
        heads = _tied_names(self.loaded.model, parameters)
        rows = map_rows(self.base.path, parameters).tensors if self.base is not None else {}
        found = []
        for weight in weights:
            name = rows[weight.name].sources[0].parameter if weight.name in rows else weight.name
            path, _, last = heads.get(name, name).rpartition(".")
            module = modules.get(path)
            kind = _kind(module, last, weight)
            if module is not None and kind:
                found.append(Watched(weight, module, kind))
        return found

    def _groups(self, watched: Sequence[Watched], text: Sequence[int]) -> list[list[Watched]]:
        """Weights by shared input, in the order of their calls."""
        groups: dict[tuple[Any, ...], list[Watched]] = {}
        kept = []  # as long as they live, no two inputs have one address

        def look(entry: Watched, given: tuple[Any, ...]) -> None:
            kept.append(given)
            routes = given[1].data_ptr() if entry.kind != "linear" else 0
            key = (given[0].data_ptr(), given[0].shape[-1], routes, entry.kind)
            groups.setdefault(key, []).append(entry)

        self._run([text], watched, look)
        return list(groups.values())

    def _budget(self, max_memory: int | None) -> int | None:
        if max_memory is None:
            return None
        device = self.loaded.model.device
        used = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes("RssAnon")
        return max_memory - used - SPARE

    def _pass(
        self,
        index: GramIndex,
        groups: Sequence[Sequence[Watched]],
        units: Sequence[Unit],
        texts: Sequence[Sequence[int]],
        folder: Path,
        progress: Progress,
    ) -> GramIndex:
        """All texts once; returns the index with the new pieces, saved."""
        device = self.loaded.model.device
        owners = {id(groups[unit.position][0]): unit for unit in units}
        grams = {unit: torch.zeros(unit.count, unit.columns, unit.columns, device=device) for unit in units}
        counts = {unit: np.zeros(unit.count, np.int64) for unit in units}

        def add(entry: Watched, given: tuple[Any, ...]) -> None:
            unit = owners[id(entry)]
            rows_of = _rows_of(entry, given)
            with torch.autocast(device.type, enabled=False):  # sums over thousands of tokens need all their bits
                for i in range(unit.count):
                    rows = rows_of(unit.first + i).float()
                    grams[unit][i].addmm_(rows.T, rows)
                    counts[unit][i] += len(rows)

        watched = [groups[unit.position][0] for unit in units]
        for batch in _batches(texts, self.batch):
            self._run(batch, watched, add)
            progress.advance(sum(map(len, batch)))
        for unit in units:
            gram = grams.pop(unit).cpu()
            squares = gram.diagonal(dim1=1, dim2=2).contiguous().numpy()
            index = written(index, folder, unit, counts[unit], squares, gram.numpy())
        index.save(folder)
        return index

    def _run(
        self, texts: Sequence[Sequence[int]], watched: Sequence[Watched], see: Callable[[Watched, tuple[Any, ...]], None]
    ) -> None:
        """One forward pass over texts of one length; `see` is called with what each watched module is called with."""

        def hook(entry: Watched) -> Any:
            def before(_module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
                see(entry, given or tuple(named.values()))

            return entry.module.register_forward_pre_hook(before, with_kwargs=True)

        handles = [hook(entry) for entry in watched]
        try:
            self.loaded.model(torch.tensor(texts, device=self.loaded.model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()


def _fingerprint(model: Any) -> str:
    """Identifies a model by the beginning of each of its parameters."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _entry(group: Sequence[Watched]) -> MeasuredInput:
    first = group[0]
    names = tuple(entry.weight.name for entry in group)
    return MeasuredInput(names, first.weight.columns, first.weight.slices, first.kind != "linear")


def _kind(module: nn.Module | None, parameter: str, weight: WantedWeight) -> str:
    """How a module uses a parameter; empty if in none of the known ways."""
    if module is None:
        return ""
    if weight.slices == 1:
        return "linear" if parameter == "weight" and not isinstance(module, nn.Embedding) else ""
    shapes = [tuple(getattr(module, name, torch.empty(0)).shape) for name in ("gate_up_proj", "down_proj")]
    # Experts whose matrices are stored input-first, or that have a gate of their own, are not these.
    if not hasattr(module, "act_fn") or shapes[1] != (shapes[0][0], shapes[0][-1], shapes[0][1] // 2):
        return ""
    return {"gate_up_proj": "experts in", "down_proj": "experts out"}.get(parameter, "")


def _tied_names(model: Any, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """The output head's name for the embedding's, where both are one parameter."""
    head = model.get_output_embeddings()
    if head is None:
        return {}
    name = next((path for path, module in model.named_modules() if module is head), "")
    return {known: f"{name}.weight" for known, value in parameters.items() if value is head.weight}


def _rows_of(entry: Watched, given: tuple[Any, ...]) -> Rows:
    """The rows that each slice sees."""
    rows = given[0].reshape(-1, given[0].shape[-1])
    if entry.kind == "linear":
        return lambda _index: rows
    routes = given[1].reshape(len(rows), -1)
    module: Any = entry.module

    def of(expert: int) -> Tensor:
        mine: Tensor = rows[(routes == expert).any(-1)]
        if entry.kind == "experts in":
            return mine
        both: Tensor = nn.functional.linear(mine, module.gate_up_proj[expert])
        gate, up = both.chunk(2, dim=-1)
        inner: Tensor = module.act_fn(gate) * up
        return inner

    return of


def _batches(texts: Sequence[Sequence[int]], most: int) -> list[list[Sequence[int]]]:
    """Texts of equal length together, up to `most` tokens."""
    found: list[list[Sequence[int]]] = []
    for text in texts:
        last = found[-1] if found else []
        if last and len(last[0]) == len(text) and (len(last) + 1) * len(text) <= most:
            last.append(text)
        else:
            found.append([text])
    return found
