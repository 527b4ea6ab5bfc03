"""Gram matrices from llama.cpp, held against sums that these tests take in transformers, and against the other source."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from convert.child import resident_bytes
from convert.gguf_file import GgufModel
from convert.imatrix_file import load_imatrix
from qguard_edge.conversion.activations import write_importance
from qguard_edge.progress import NoProgress
from qguard_edge.runtimes.activations import LlamaGramSource
from qguard_edge.runtimes.activations_worker import SPARE
from qguard_edge.runtimes.gram_files import GramError, GramIndex, GramPiece, MeasuredInput, WantedWeight, write_array
from qguard_edge.runtimes.grams import Grams, wanted_weights
from qguard_edge.runtimes.hf_grams import TransformersGramSource
from tests.helpers.activation_models import Pair, distance, inputs_of, make_pair, texts
from tests.helpers.gguf_copies import copy_gguf

TOLERANCE = 1e-5
GELU_TOLERANCE = 2e-3  # llama.cpp reads it from a table of half-precision values


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair("qwen3-moe", tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two matrices of 16 MiB: what else a process allocates does not matter beside them."""
    return make_pair("llama", tmp_path_factory.mktemp("wide"), intermediate_size=2048)


@pytest.fixture(scope="module")
def wide_mixture(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Eight matrices of 4 MiB."""
    return make_pair("qwen3-moe", tmp_path_factory.mktemp("wide"), moe_intermediate_size=1024)


def limit_for(free: Grams, grams: int) -> int:
    """The `max_memory` that leaves about so many bytes for matrices and copies, from a run that held all of them."""
    everything = sum(path.stat().st_size for path in free.folder.glob("*.gram"))
    return int(free.index.figures["anonymous_bytes"]) - everything + SPARE + grams + resident_bytes("RssAnon")


def collect(base: GgufModel, folder: Path, rows: list[list[int]] | None = None, **options: Any) -> Grams:
    limits = {name: options.pop(name) for name in ("max_memory", "progress") if name in options}
    source = LlamaGramSource(base, **{"exact": True, **options})
    return source.collect(wanted_weights(base), rows or texts(), folder, threads=1, **limits)


SUMS = (".gram", ".squares", ".rows", ".order")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in SUMS}


def test_matrices_equal_an_independent_sum(llama: Pair, tmp_path: Path) -> None:
    grams = collect(llama.base, tmp_path)
    paths = {"output.weight": "lm_head", "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj"}
    for layer in (0, 1):
        paths[f"blk.{layer}.attn_output.weight"] = f"model.layers.{layer}.self_attn.o_proj"
        paths[f"blk.{layer}.ffn_up.weight"] = f"model.layers.{layer}.mlp.up_proj"
        paths[f"blk.{layer}.ffn_down.weight"] = f"model.layers.{layer}.mlp.down_proj"
    seen = inputs_of(llama.loaded.model, list(paths.values()), texts())
    for tensor, path in paths.items():
        rows = seen[path]
        assert grams.rows(tensor) == len(rows) == sum(map(len, texts()))
        assert distance(grams.of(tensor, 0), rows.T @ rows / len(rows)) < TOLERANCE, tensor
        assert distance(grams.of(tensor), grams.of(tensor, 0)) == 0
        diagonal = grams.diagonal(tensor)
        assert diagonal.counts.tolist() == [len(rows)]
        assert distance(torch.from_numpy(diagonal.squares), rows.square().sum(0)[None]) < TOLERANCE
    assert grams.shares("blk.1.attn_v.weight") == ("blk.1.attn_q.weight", "blk.1.attn_v.weight", "blk.1.attn_k.weight")
    assert set(grams.shares("blk.1.ffn_up.weight")) == {"blk.1.ffn_up.weight", "blk.1.ffn_gate.weight"}
    assert grams.missing == ("token_embd.weight",)
    with pytest.raises(GramError, match=r"no Gram matrix of token_embd\.weight: no product of the model reads it"):
        grams.of("token_embd.weight")


def test_each_expert_has_its_own(mixture: Pair, tmp_path: Path) -> None:
    grams = collect(mixture.base, tmp_path)
    model: Any = mixture.loaded.model
    experts, seen = model.model.layers[1].mlp.experts, []
    handle = experts.register_forward_pre_hook(lambda _module, given: seen.append(given))
    with torch.inference_mode():
        for row in texts():
            model(torch.tensor([row]))
    handle.remove()
    states, routes = torch.cat([given[0] for given in seen]).double(), torch.cat([given[1] for given in seen])
    name = "blk.1.ffn_up_exps.weight"
    assert grams.rows(name) == routes.numel()
    squares = grams.diagonal(name).squares
    chosen = states.repeat_interleave(routes.shape[1], 0)
    pooled = chosen.T @ chosen / routes.numel()
    for expert in range(4):
        mine = states[(routes == expert).any(-1)]
        assert 0 < grams.rows(name, expert) == len(mine) < len(states)
        assert distance(torch.from_numpy(squares[expert]), mine.square().sum(0)) < TOLERANCE
        trust = len(mine) / (len(mine) + 256)
        expected = trust * mine.T @ mine / len(mine) + (1 - trust) * pooled
        assert distance(grams.of(name, expert), expected) < TOLERANCE
    assert distance(grams.of(name), pooled) < TOLERANCE
    assert grams.missing == ("token_embd.weight",)


@pytest.mark.parametrize("name", ["llama", "llama-tied-mha", "qwen3-moe", "gemma2", "phi", "phi3", "gpt2", "starcoder2"])
def test_both_sources_agree(name: str, tmp_path: Path) -> None:
    pair = make_pair(name, tmp_path)
    tolerance = GELU_TOLERANCE if name in ("gemma2", "phi", "gpt2", "starcoder2") else TOLERANCE
    rows = texts((8, 8, 7)) if name == "gemma2" else texts()  # the toy's window is eight tokens
    ours = collect(pair.base, tmp_path / "llama", rows)
    theirs = TransformersGramSource(pair.loaded, pair.base).collect(
        wanted_weights(pair.base), rows, tmp_path / "transformers"
    )
    assert set(ours.names) == set(theirs.names)
    assert set(ours.missing) == set(theirs.missing) <= {"token_embd.weight", "position_embd.weight"}
    for tensor in ours.names:
        # Of phi's last layer llama.cpp drops unwanted positions between two readers of one input.
        assert set(ours.shares(tensor)) == set(theirs.shares(tensor)) or (tensor.startswith("blk.1.") and name == "phi")
        slices = len(ours.diagonal(tensor).counts)
        for expert in range(slices):
            assert ours.rows(tensor, expert) == theirs.rows(tensor, expert)
            assert distance(ours.of(tensor, expert), theirs.of(tensor, expert)) < tolerance, tensor


def test_the_tied_output_matrix_sees_every_position(tmp_path: Path) -> None:
    pair = make_pair("llama-tied-mha", tmp_path)
    grams = collect(pair.base, tmp_path / "grams")
    rows = inputs_of(pair.loaded.model, ["lm_head"], texts())["lm_head"]
    assert "output.weight" not in pair.base.tensors
    assert grams.rows("token_embd.weight") == len(rows)
    assert distance(grams.of("token_embd.weight"), rows.T @ rows / len(rows)) < TOLERANCE


def test_a_split_model_gives_the_same(llama: Pair, tmp_path: Path) -> None:
    split = GgufModel(copy_gguf(llama.base.path, tmp_path / "model.gguf", shard_tensors=6)[0])
    assert len(split.shards) > 2
    whole = collect(llama.base, tmp_path / "whole")
    parts = collect(split, tmp_path / "parts")
    assert parts.names == whole.names
    assert contents(parts.folder) == contents(whole.folder)


def test_an_importance_matrix_is_the_damped_diagonal(mixture: Pair, tmp_path: Path) -> None:
    grams = collect(mixture.base, tmp_path / "grams")
    path = write_importance(grams, tmp_path / "imatrix.gguf", "text", 100)
    written = load_imatrix(path)
    assert set(written.entries) == {name for name in grams.names if name.startswith("blk.")}
    assert any("_exps" in name for name in written.entries)
    for name in written.entries:
        slices = len(grams.diagonal(name).counts)
        diagonal = torch.stack([grams.of(name, i).diagonal() for i in range(slices)])
        expected = diagonal + 0.03 * diagonal.mean(1, keepdim=True)
        found = written.for_tensor(name, diagonal.shape[1], slices)
        assert found is not None
        assert np.allclose(found, expected.numpy(), rtol=1e-4), name


def test_two_runs_are_equal_to_the_bit_and_so_are_copies_of_the_inputs(mixture: Pair, tmp_path: Path) -> None:
    first = collect(mixture.base, tmp_path / "first")
    assert contents(collect(mixture.base, tmp_path / "second").folder) == contents(first.folder)
    assert contents(collect(mixture.base, tmp_path / "copied", copy=True).folder) == contents(first.folder)


class Used(NoProgress):
    """Remembers how many tokens were promised."""

    total = 0

    def stage(self, name: str, total: int, unit: str) -> None:
        self.total = total


def test_passes_under_a_limit_give_the_same(wide_llama: Pair, tmp_path: Path) -> None:
    base = wide_llama.base
    free = collect(base, tmp_path / "free")
    progress = Used()
    tight = collect(base, tmp_path / "tight", max_memory=limit_for(free, 32 << 20), progress=progress)
    assert progress.total == 2 * sum(map(len, texts()))
    assert tight.index.figures["passes"] == 2
    assert tight.index.figures["anonymous_bytes"] < free.index.figures["anonymous_bytes"] - (4 << 20)
    assert tight.names == free.names
    for name in free.names:
        for expert in range(len(free.diagonal(name).counts)):
            assert torch.equal(tight.of(name, expert), free.of(name, expert))
    with pytest.raises(
        GramError, match=r"MiB are left for it; raise --max-memory by \d+ MiB; --defense ortho needs no activations"
    ):
        collect(base, tmp_path / "none", max_memory=1 << 20)


def test_the_rows_of_experts_take_no_memory(wide_mixture: Pair, tmp_path: Path) -> None:
    """Eight matrices of 4 MiB would not fit under the limit; the rows that they are made of are kept in one pass."""
    free = collect(wide_mixture.base, tmp_path / "free")
    tight = collect(wide_mixture.base, tmp_path / "tight", max_memory=limit_for(free, 16 << 20))
    assert tight.index.figures["passes"] == 1
    assert contents(tight.folder) == contents(free.folder)
    kept = [entry for entry in tight.index.inputs if entry.routed]
    assert [entry.kept_rows for entry in kept] == [180, 360] * 2  # a token has a row, and one for each of its two experts
    for entry in kept:
        assert (tight.folder / f"{entry.pieces[0].stem}.rows").stat().st_size == 4 * entry.kept_rows * entry.columns


def test_many_rows_of_experts_are_added_up(mixture: Pair, tmp_path: Path) -> None:
    """Where they would be more than the matrices have."""
    many = texts((48,) * 24)
    summed = collect(mixture.base, tmp_path / "summed", many)
    assert [entry.kept_rows for entry in summed.index.inputs if entry.routed] == [0] * 4
    theirs = TransformersGramSource(mixture.loaded, mixture.base).collect(
        wanted_weights(mixture.base), many, tmp_path / "transformers"
    )
    for name in ("blk.1.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"):
        for expert in (None, 0, 1, 2, 3):
            assert summed.rows(name, expert) == theirs.rows(name, expert)
            assert distance(summed.of(name, expert), theirs.of(name, expert)) < TOLERANCE


class Stop(NoProgress):
    """Interrupts after the first pass."""

    def __init__(self, tokens: int) -> None:
        self.left = tokens

    def advance(self, count: int, detail: str = "") -> None:
        self.left -= count
        if self.left < 0:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_behind_its_last_pass(wide_llama: Pair, tmp_path: Path) -> None:
    free = collect(wide_llama.base, tmp_path / "free")
    limit = limit_for(free, 32 << 20)
    with pytest.raises(KeyboardInterrupt):
        collect(wide_llama.base, tmp_path / "again", max_memory=limit, progress=Stop(sum(map(len, texts()))))
    begun = Grams(tmp_path / "again")
    assert 0 < len(begun.names) < len(free.names)
    resumed = collect(wide_llama.base, tmp_path / "again", progress=(used := Used()))
    assert used.total == sum(map(len, texts()))
    for name in free.names:
        assert torch.equal(resumed.of(name), free.of(name))
    other = collect(wide_llama.base, tmp_path / "again", texts(seed=1))
    assert not torch.equal(other.of("output.weight"), free.of("output.weight"))


class Killer(NoProgress):
    """Ends the child that is running."""

    def advance(self, count: int, detail: str = "") -> None:
        for child in psutil.Process().children():
            if "qguard_edge.runtimes.activations_worker" in child.cmdline():
                os.kill(child.pid, signal.SIGSEGV)


def test_the_death_of_the_child_is_one_sentence(llama: Pair, tmp_path: Path) -> None:
    with pytest.raises(
        GramError,
        match=r"^no activations of base\.gguf: llama\.cpp was stopped by signal 11.*; --defense ortho needs no act",
    ):
        collect(llama.base, tmp_path / "grams", texts((48,) * 40), progress=Killer(), batch=48)


def test_a_model_that_llama_cpp_refuses_is_one_sentence(llama: Pair, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    data = llama.base.path.read_bytes()
    broken.write_bytes(data.replace(b"blk.1.attn_norm.weight", b"blk.1.attn_norn.weight"))
    with pytest.raises(GramError, match=r"cannot load broken\.gguf.*; --defense ortho"):
        collect(GgufModel(broken), tmp_path / "grams")
    with pytest.raises(GramError, match="token 99999, the model has 384"):
        collect(llama.base, tmp_path / "grams", [[1, 99999]])


def test_squares_alone_are_the_diagonal(mixture: Pair, tmp_path: Path) -> None:
    full = collect(mixture.base, tmp_path / "full")
    squares = collect(mixture.base, tmp_path / "squares", products=False)
    assert not list(squares.folder.glob("*.gram"))
    assert squares.names == full.names
    for name in full.names:
        ours, expected = squares.diagonal(name), full.diagonal(name)
        assert (ours.counts == expected.counts).all()
        assert np.allclose(ours.squares, expected.squares, rtol=1e-5)
    with pytest.raises(GramError, match="only sums of squares"):
        squares.of("output.weight")


def test_long_texts_go_in_pieces(llama: Pair, tmp_path: Path) -> None:
    """A text longer than a batch: later pieces see the earlier ones' keys and values."""
    rows = texts((200, 130))
    small, large = collect(llama.base, tmp_path / "small", rows, batch=64), collect(llama.base, tmp_path / "large", rows)
    seen = inputs_of(llama.loaded.model, ["model.layers.1.mlp.down_proj"], rows)["model.layers.1.mlp.down_proj"]
    for grams in (small, large):
        assert grams.rows("blk.1.ffn_down.weight") == 330
        assert distance(grams.of("blk.1.ffn_down.weight"), seen.T @ seen / 330) < TOLERANCE


def test_an_expert_leans_on_its_layer_as_far_as_it_saw_little(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = [generator.standard_normal((count, 8)).astype(np.float32) for count in (0, 4, 8000)]
    sums = np.stack([x.T @ x for x in rows])
    means = np.stack([total / np.float32(count) for total, count in zip(sums, (1, 4, 8000), strict=True)])
    write_array(tmp_path / "a.gram", means)
    write_array(tmp_path / "a.squares", np.stack([s.diagonal() for s in sums]))
    entry = MeasuredInput(("exps",), 8, 3, routed=True, pieces=(GramPiece("a", 0, (0, 4, 8000)),))
    GramIndex("job", products=True, inputs=(entry,)).save(tmp_path)
    grams = Grams(tmp_path)
    pooled = torch.from_numpy(sums.sum(0) / 8004)
    assert torch.allclose(grams.of("exps", 0), pooled)
    assert torch.allclose(grams.of("exps", 1), torch.from_numpy(means[1]) * 4 / 12 + pooled * 8 / 12, atol=1e-6)
    assert distance(grams.of("exps", 2), torch.from_numpy(means[2])) < 1e-3
    with pytest.raises(GramError, match="there is no number 3"):
        grams.of("exps", 3)
    stacked = dataclasses.replace(entry, routed=False)
    GramIndex("job", products=True, inputs=(stacked,)).save(tmp_path)
    assert torch.allclose(Grams(tmp_path).of("exps", 1), torch.from_numpy(means[1]))


def test_a_weight_that_does_not_fit_its_product_is_named(llama: Pair, tmp_path: Path) -> None:
    weights = [WantedWeight("blk.0.ffn_up.weight", 128), WantedWeight("blk.0.ffn_down.weight", 512)]
    grams = LlamaGramSource(llama.base).collect(weights, texts(), tmp_path, threads=1)
    assert grams.names == ("blk.0.ffn_down.weight",)
    assert grams.missing == ("blk.0.ffn_up.weight",)
    with pytest.raises(GramError, match="has 1 matrices of 256 columns, not 1 of 128"):
        grams.of("blk.0.ffn_up.weight")


@pytest.mark.parametrize("base_type", ["bf16", "f16"])
def test_half_precision_bases(base_type: str, tmp_path: Path) -> None:
    """llama.cpp rounds the inputs of such products to half precision; what is summed is what comes before."""
    pair = make_pair("llama", tmp_path, base_type=base_type)
    grams = collect(pair.base, tmp_path / "grams")
    path = "model.layers.1.mlp.down_proj"
    seen = inputs_of(pair.loaded.model, [path], texts())[path]
    assert distance(grams.of("blk.1.ffn_down.weight"), seen.T @ seen / len(seen)) < 0.02
