"""How fast this machine is at the work of `feedback`: the same programs on one small layer with random weights.

Some seconds, of which most start child processes. llama.cpp runs the layer on random tokens and its Gram matrices are added
up, llama.cpp quantizes it to the wanted type, and some of its rows are rounded on all threads at once, so that what the cores
share (cache, memory, clock) is in the figures. All are processor time by threads: the time of a machine that does nothing else.
"""

import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter

from convert.gguf_file import GgufFile, GgufModel
from convert.quantizer import QuantizeOptions, quantize
from convert.scratch import scratch_folder
from convert.tensor_io import RowSlice, TensorReader, open_reader, single_threaded_torch
from qguard_edge.conversion.activations import write_importance
from qguard_edge.conversion.feedback_cost import Model, Rates, inputs_of, matrices_of, reference
from qguard_edge.defenses.base import Defense, SliceKey, make_defense
from qguard_edge.defenses.options import FeedbackOptions
from qguard_edge.rounding.room import SAMPLE_ROWS, SAMPLE_RUNS, SLICE_WEIGHTS
from qguard_edge.runtimes.activations import LlamaGramSource
from qguard_edge.runtimes.grams import Grams, wanted_weights
from quant_grids import GRIDS

WIDTH, INNER, HEADS, KV_HEADS, VOCABULARY = 1024, 3072, 16, 4, 256
TEXTS, LENGTH = 8, 256
ROUNDED = (
    ("blk.0.attn_q.weight", 64),
    ("blk.0.attn_q.weight", SLICE_WEIGHTS // WIDTH),
    ("blk.0.ffn_down.weight", SLICE_WEIGHTS // INNER),
)
"""Tensors, and rows of them, that the rounding is timed on: few short rows, many, and fewer long ones."""
SAMPLE = SAMPLE_RUNS * SAMPLE_ROWS


@functools.lru_cache(maxsize=4)
def measured_rates(options: QuantizeOptions, source: GGMLQuantizationType, threads: int) -> Rates:
    """The rates of this machine.

    Args:
        options: of llama.cpp's quantizer, for the type.
        source: type of the base's matrices; others than f32, f16 and bf16 count as bf16.
        threads: that work.

    Raises:
        QGuardError: llama.cpp does not run here.
    """
    with scratch_folder() as folder:
        base = GgufModel(_write_layer(folder / "layer.gguf", source))
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, (TEXTS, LENGTH)).tolist()
        grams = LlamaGramSource(base, way_out="").collect(wanted_weights(base), tokens, folder / "grams", threads=threads)
        forward, products = _activation_rates(base, grams, threads)
        options = replace(options, threads=threads, tensor_types=(), imatrix=_importance(options, grams, folder))
        quantized = quantize(base.path, folder / "plain.gguf", options)
        weights = sum(tensor.n_weights for tensor in base.tensors.values())
        rates = replace(
            reference(threads), forward=forward, products=products, plain=quantized.processor / (threads * weights)
        )
        return _rounding_rates(base, GgufFile(folder / "plain.gguf"), grams, rates)


def _write_layer(path: Path, source: GGMLQuantizationType) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    generator = np.random.default_rng(0)
    shapes = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (WIDTH * KV_HEADS // HEADS, WIDTH),
        "attn_v": (WIDTH * KV_HEADS // HEADS, WIDTH),
    }
    shapes |= {
        "attn_output": (WIDTH, WIDTH),
        "ffn_gate": (INNER, WIDTH),
        "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER),
    }
    named = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    for name, shape in {"token_embd.weight": (VOCABULARY, WIDTH), **named, "output.weight": (VOCABULARY, WIDTH)}.items():
        values = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        if source == GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        elif source == GGMLQuantizationType.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            bits = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
            writer.add_tensor(name, bits, raw_shape=bits.shape, raw_dtype=GGMLQuantizationType.BF16)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _activation_rates(base: GgufModel, grams: Grams, threads: int) -> tuple[float, float]:
    """Per weight and token of the forward pass, per squared column and token of the Gram matrices."""
    figures, tokens = grams.index.figures, TEXTS * LENGTH
    model = Model(matrices_of((t.name, t.shape) for t in base.tensors.values()), 1, LENGTH, tokens)
    inputs = inputs_of(model)
    forward = figures["decode_processor"] - figures["products_processor"]
    squares = sum(work.columns**2 for work in inputs)
    return forward / (threads * tokens * inputs[-1].before), figures["products_processor"] / (threads * tokens * squares)


def _importance(options: QuantizeOptions, grams: Grams, folder: Path) -> Path | None:
    """An importance matrix for a type that is not written without one."""
    if not options.file_type.needs_imatrix:
        return None
    return write_importance(grams, folder / "layer.imatrix.gguf", "random", TEXTS * LENGTH)


def _rounding_rates(base: GgufModel, plain: GgufFile, grams: Grams, rates: Rates) -> Rates:
    """The rates with those of the rounding; unchanged where the layer's matrices stay floats."""
    defense = make_defense(FeedbackOptions())
    with open_reader(base.path, plain.path) as reader, single_threaded_torch(), ThreadPoolExecutor(rates.threads) as pool:
        timer = _Timer(base, plain, grams, reader, defense, pool, rates.threads)
        if not all(plain.tensors[name].ggml_type in GRIDS for name, _ in ROUNDED):
            return rates
        long = ROUNDED[-1][0]
        factor = timer.seconds(lambda: timer.factor(long)) / INNER**3
        seconds = [timer.round(name, rows) for name, rows in ROUNDED]
        columns = [base.tensors[name].columns for name, _ in ROUNDED]
        work = [[n, n * rows, n * rows * n] for n, (_, rows) in zip(columns, ROUNDED, strict=True)]
        column, weight, feed = np.maximum(np.linalg.solve(np.array(work, float), np.array(seconds)), 0.0)
        rates = replace(rates, factor=factor, column=float(column), weight=float(weight), feed=float(feed))
        settle = statistics.mean(
            timer.settle(name) / rates.slice_seconds(SAMPLE, base.tensors[name].columns)
            for name in {name for name, _ in ROUNDED}
        )
        return replace(rates, settle=settle)


class _Timer:
    """Processor time of the steps of the rounding, each done by all threads at once."""

    def __init__(
        self,
        base: GgufModel,
        plain: GgufFile,
        grams: Grams,
        reader: TensorReader,
        defense: Defense[Any],
        pool: ThreadPoolExecutor,
        threads: int,
    ) -> None:
        self.base, self.plain, self.grams, self.reader = base, plain, grams, reader
        self.defense, self.pool, self.threads = defense, pool, threads
        self.factors = {name: self.factor(name) for name in {name for name, _ in ROUNDED}}

    def seconds(self, step: Callable[[], Any]) -> float:
        """Of one step, while every thread does it; the better of two."""

        def run(_: int) -> float:
            with torch.inference_mode():
                used = time.thread_time()
                step()
                return time.thread_time() - used

        return min(statistics.mean(self.pool.map(run, range(self.threads))) for _ in range(2))

    def factor(self, name: str) -> Any:
        """The factor of a tensor's inputs."""
        with torch.inference_mode():
            grid = GRIDS[self.plain.tensors[name].ggml_type]
            return self.defense.factor(grid, self.grams.of(name, 0), self.base.tensors[name].columns, torch.device("cpu"))

    def rule(self, name: str, rows: int) -> Any:
        """The rule of a tensor, settled on its first rows."""
        grid, part = GRIDS[self.plain.tensors[name].ggml_type], RowSlice(0, 0, rows)
        blocks, weights = (
            self.reader.blocks(self.plain.tensors[name], part),
            self.reader.weights(self.base.tensors[name], part),
        )
        return self.defense.on(grid).fit(grid, self.factors[name], blocks, weights, SliceKey(0, name, 0))

    def settle(self, name: str) -> float:
        """Seconds of settling a rule."""
        return self.seconds(lambda: self.rule(name, SAMPLE))

    def round(self, name: str, rows: int) -> float:
        """Seconds of rounding some rows, reading included."""
        with torch.inference_mode():
            rule = self.rule(name, 32)
        part = RowSlice(0, 0, rows)

        def step() -> None:
            blocks = self.reader.blocks(self.plain.tensors[name], part)
            rule.round(blocks, self.reader.weights(self.base.tensors[name], part), SliceKey(0, name, 1))

        return self.seconds(step)
