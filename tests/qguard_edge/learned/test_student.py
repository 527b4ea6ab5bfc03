"""The torch side of a GGUF: every tensor mapped or reported, the hard forward, the straight-through gradient."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from qguard_edge.defenses.options import QuantGuardOptions
from qguard_edge.learned.constraint import alignment_of
from qguard_edge.learned.endtoend import TextBatch, logits_of, make_variables
from qguard_edge.learned.losses import kl_divergence
from qguard_edge.learned.parts import make_parts, require_scalar
from qguard_edge.learned.student import Student
from quant_grids.errors import UnsupportedError
from tests.helpers.learned_setup import Setup, make_setup

CPU = torch.device("cpu")


def test_every_tensor_is_mapped_or_reported(setup: Setup) -> None:
    mapped = {part.tensor.name for part in setup.parts.parts}
    assert mapped == {tensor.name for tensor in setup.target.tensors}
    assert setup.parts.unmapped == ()
    # A parameter that the model does not have is a tensor that cannot be learned.
    parameters = dict(setup.loaded.model.named_parameters())
    del parameters["model.layers.1.mlp.up_proj.weight"]
    fewer = make_parts(setup.target.base, setup.target.plain, setup.target.tensors, parameters)
    assert [tensor.name for tensor in fewer.unmapped] == ["blk.1.ffn_up.weight"]


def test_tied_embeddings_are_learned_once(tied_folder: Path, tmp_path: Path) -> None:
    made = make_setup(tied_folder, tmp_path, "q4_0")
    names = [part.source.parameter for part in made.parts.parts]
    assert names.count("model.embed_tokens.weight") == 1
    assert len(names) == len(set(names)) == len(made.target.tensors)


def test_without_flips_the_student_is_the_dequantized_plain_file(setup: Setup) -> None:
    """The oracle is gguf's own dequantizer; q and k are compared after llama.cpp's reordering is undone by rows."""
    variables = make_variables(setup.parts.parts, QuantGuardOptions(), [CPU] * len(setup.parts.parts))
    student = Student(setup.loaded.model, setup.parts.parts)
    student.load_all(variables)
    tensors = {t.name: t for t in GGUFReader(setup.target.plain.path).tensors}
    for part in setup.parts.parts:
        stored = torch.from_numpy(dequantize(tensors[part.tensor.name].data, tensors[part.tensor.name].tensor_type))
        assert torch.equal(part.gather(student.parameters[part.source.parameter].detach()), stored[part.rows])
    # What is not quantized is the teacher's own.
    teacher = dict(setup.loaded.model.named_parameters())
    assert student.parameters["model.norm.weight"] is teacher["model.norm.weight"]


def test_both_values_of_a_weight_bracket_it(setup: Setup) -> None:
    for part in setup.parts.parts:
        weights = part.gather(dict(setup.loaded.model.named_parameters())[part.source.parameter].detach()).float()
        one = part.geometry()
        flips = one.delta != 0
        between = one.value + one.ratio * one.delta
        scale = one.delta.abs().clamp(min=1e-9)
        assert float(((between - weights).abs() / scale)[flips].max()) < 1e-3
        error = float((one.value.double() - weights.double()).square().sum())
        assert one.energy == pytest.approx(error, rel=1e-4)


def test_drawn_codes_and_their_flips_bracket_the_weights_too(setup: Setup) -> None:
    """The oracle of `<t', t>` is the sum over the values themselves."""
    plain = {part.name: part.geometry() for part in setup.parts.parts}
    for part in setup.drawn_parts:
        weights = part.gather(dict(setup.loaded.model.named_parameters())[part.source.parameter].detach()).float()
        one, old = part.geometry(), plain[part.name].value - weights
        assert not torch.equal(one.value, plain[part.name].value)
        assert one.energy == pytest.approx(float(old.double().square().sum()), rel=1e-4)
        assert one.left == pytest.approx(
            float(((one.value - weights) * old).double().sum()), rel=1e-3, abs=1e-4 * one.energy
        )
        flipped = one.value + one.delta
        assert bool((((one.value - weights) * (flipped - weights))[one.delta != 0] <= 1e-9).all()), "not across the weight"
        chosen = torch.rand(one.value.shape, generator=torch.Generator().manual_seed(0)) < 0.3
        left = ((torch.where(chosen, flipped, one.value) - weights) * old).double().sum()
        assert alignment_of(chosen, one) == pytest.approx(float(left) / one.energy, abs=1e-3)


def test_flipped_blocks_hold_the_flipped_values(setup: Setup) -> None:
    drawn = setup.draw()
    part = next(part for part in setup.drawn_parts if part.tensor.name == "blk.0.ffn_down.weight")
    one, matrix = part.geometry(), setup.target.plain.tensors[part.tensor.name]
    chosen = torch.rand(one.value.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    chosen &= one.delta != 0
    blocks = setup.target.flipped(matrix, drawn[matrix.name], chosen)
    stored = torch.from_numpy(dequantize(blocks.view(matrix.rows, -1).numpy(), GGMLQuantizationType.Q4_0))
    assert torch.allclose(stored, torch.where(chosen, one.value + one.delta, one.value), atol=1e-6)


def test_the_straight_through_slope_is_the_derivative_of_the_soft_loss(setup: Setup, samples: list[tuple[int, ...]]) -> None:
    """At a soft point, in f64 and without autocast: dL/dh = dL/dv * delta against central differences."""
    import copy

    model = copy.deepcopy(setup.loaded.model).double()
    ids = torch.tensor([samples[0], samples[1]])

    def forward(one: Any) -> torch.Tensor:
        logits: torch.Tensor = one(input_ids=ids, use_cache=False).logits
        return logits.flatten(0, 1)

    with torch.no_grad():
        wanted = forward(model)
    part = next(p for p in setup.parts.parts if p.tensor.name == "blk.1.ffn_down.weight")
    student = copy.deepcopy(model)
    parameter = dict(student.named_parameters())[part.source.parameter].requires_grad_(True)
    h = part.geometry().ratio.double() * 0.3 + 0.1

    def loss_at(values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            part.scatter(part.geometry().value.double() + values * part.geometry().delta.double(), parameter)
        p, q = wanted.log_softmax(-1), forward(student).log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()

    loss_at(h).backward()
    slope = part.gather(parameter.grad) * part.geometry().delta.double()
    index = slope.abs().flatten().topk(3).indices
    for flat in index.tolist():
        step = torch.zeros_like(h).flatten()
        step[flat] = 1e-3
        step = step.view(h.shape)
        with torch.no_grad():
            numeric = float(loss_at(h + step) - loss_at(h - step)) / 2e-3
        assert float(slope.flatten()[flat]) == pytest.approx(numeric, rel=2e-2)  # norms compute in f32


def test_gradients_are_handed_over_and_freed(setup: Setup, samples: list[tuple[int, ...]]) -> None:
    student = Student(setup.loaded.model, setup.parts.parts)
    seen: dict[int, torch.Tensor] = {}
    handles = student.on_gradients(lambda index, slope: seen.update({index: slope}))
    ids = torch.tensor([samples[0]])
    batch = TextBatch(ids, torch.ones_like(ids))
    logits = logits_of(student.model, batch, CPU)
    kl_divergence(torch.zeros_like(logits), logits).backward()
    assert sorted(seen) == list(range(len(setup.parts.parts)))
    assert all(parameter.grad is None for parameter in student.parameters.values())
    for handle in handles:
        handle.remove()


def test_lattice_types_are_refused_with_a_way_out(setup: Setup) -> None:
    tensor = replace(setup.target.tensors[0], ggml_type=GGMLQuantizationType.IQ2_XS)
    with pytest.raises(UnsupportedError, match="--defense feedback"):
        require_scalar([tensor], "quantguard")
