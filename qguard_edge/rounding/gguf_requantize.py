"""Defenses that move the weights and let the unmodified quantizer round them: noise and QVec as their papers describe them.

The moved weights go into an F32 copy of the base, llama.cpp quantizes that with the same options, and the result is measured
against the first plain file: `t = Q(W) - W` and `t' = Q(W') - W`. Scales are fitted anew, so more than code bits differ.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from convert.cores import available_cores
from convert.float_copy import FloatCopy
from convert.gguf_file import GgufFile, GgufModel, TensorInfo
from convert.tensor_io import RowSlice, TensorReader, open_reader, row_slices, single_threaded_torch
from qguard_edge.defenses.base import Defense, SliceKey
from qguard_edge.progress import Progress
from qguard_edge.rounding.choose import measured_outcome
from qguard_edge.rounding.gguf import TensorRounding
from quant_grids import GRIDS, Outcome


@contextmanager
def _workers(threads: int, *paths: Path) -> Iterator[tuple[TensorReader, ThreadPoolExecutor]]:
    with (
        open_reader(*paths) as reader,
        single_threaded_torch(),
        ThreadPoolExecutor(threads or available_cores()) as pool,
    ):
        yield reader, pool


def write_moved_base(
    base: GgufModel,
    plain: GgufFile,
    tensors: tuple[TensorInfo, ...],
    defense: Defense[Any],
    path: Path,
    *,
    seed: int,
    threads: int = 0,
    progress: Progress | None = None,
) -> None:
    """Write an F32 copy of the base in which the defense has moved the given tensors' weights.

    Args:
        base: full precision.
        plain: what llama.cpp made of it.
        tensors: of the plain file, to be moved.
        defense: one that `requantizes`.
        path: the new file.
        seed: of the random numbers.
        threads: slices in work at a time, 0 for one per core.
        progress: told the number of weights done.
    """
    copy = FloatCopy(base, path, {tensor.name for tensor in tensors})
    try:
        with _workers(threads, plain.path, *(shard.path for shard in base.shards)) as (reader, pool):
            for tensor in tensors:
                source, parts = base.tensors[tensor.name], row_slices(tensor)
                steps = list(pool.map(lambda part, t=tensor: _half_width(reader, t, part), parts))
                half_width = float(torch.tensor(steps).median())

                def move(
                    part: RowSlice, tensor: TensorInfo = tensor, source: TensorInfo = source, h: float = half_width
                ) -> None:
                    with torch.inference_mode():
                        key = SliceKey(seed, tensor.name, part.index)
                        moved = defense.move(reader.weights(source, part), reader.weights(tensor, part), h, key)
                        copy.write_rows(source, part.start, moved)

                list(pool.map(move, parts))
                if progress:
                    progress.advance(tensor.n_weights, tensor.name)
    finally:
        copy.close()


def _half_width(reader: TensorReader, tensor: TensorInfo, part: RowSlice) -> float:
    """Half the median distance of neighbouring levels in one slice, in units of a weight."""
    with torch.inference_mode():
        return float(GRIDS[tensor.ggml_type].steps(reader.blocks(tensor, part)).median()) / 2.0


def measure_requantized(
    base: GgufModel,
    plain: GgufFile,
    made: GgufFile,
    tensors: tuple[TensorInfo, ...],
    *,
    threads: int = 0,
    progress: Progress | None = None,
) -> tuple[TensorRounding, ...]:
    """What re-quantizing did to each tensor, measured from the files."""
    results = []
    with _workers(threads, plain.path, made.path, *(shard.path for shard in base.shards)) as (reader, pool):
        for tensor in tensors:
            started = time.perf_counter()

            def measure(part: RowSlice, tensor: TensorInfo = tensor) -> Outcome:
                with torch.inference_mode():
                    full = reader.weights(base.tensors[tensor.name], part)
                    old, new = reader.blocks(tensor, part), reader.blocks(made.tensors[tensor.name], part)
                    return measured_outcome(GRIDS[tensor.ggml_type], old, new, full)

            total = Outcome.sum(pool.map(measure, row_slices(tensor)))
            seconds = time.perf_counter() - started
            results.append(TensorRounding(tensor.name, tensor.ggml_type, tensor.n_weights, total, seconds))
            if progress:
                progress.advance(tensor.n_weights, tensor.name)
    return tuple(results)
