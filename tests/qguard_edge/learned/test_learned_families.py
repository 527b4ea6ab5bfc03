"""Every shape of correspondence between torch and GGUF: reordered, fused, split, stacked and transposed rows.

For each family a whole learned step in both scopes; the oracle for the values is gguf's own dequantizer.
"""

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from qguard_edge.defenses.options import EfrapOptions, QuantGuardOptions
from qguard_edge.learned.blockwise import BlockScope, efrap_positions
from qguard_edge.learned.endtoend import EndToEnd, make_variables
from qguard_edge.learned.student import Student
from tests.helpers.hf_models import CASES, make_model, save_model
from tests.helpers.hf_tokenizers import digits_then_bytes, save_tokenizer, train_byte_bpe
from tests.helpers.learned_setup import make_setup

BY_NAME = {case.name: case for case in CASES}
TOKENIZER = train_byte_bpe(digits_then_bytes())
CPU = torch.device("cpu")


@pytest.mark.training
@pytest.mark.parametrize("name", ["llama-biases", "qwen3-moe", "gemma2", "phi", "phi3", "starcoder", "gpt2"])
def test_a_family(name: str, samples: list[tuple[int, ...]], tmp_path: Path) -> None:
    case = BY_NAME[name]
    folder = tmp_path / "model"
    save_model(case, make_model(case), folder)
    save_tokenizer(TOKENIZER, folder)
    setup = make_setup(folder, tmp_path, "q4_0")
    parts = setup.parts.parts
    assert setup.parts.unmapped == ()
    assert {part.tensor.name for part in parts} == {tensor.name for tensor in setup.target.tensors}

    student = Student(setup.loaded.model, parts)
    variables = make_variables(parts, QuantGuardOptions(), [CPU] * len(parts))
    student.load_all(variables)
    stored = {tensor.name: tensor for tensor in GGUFReader(setup.target.plain.path).tensors}
    full = dict(setup.loaded.model.named_parameters())
    for part in parts:
        tensor = stored[part.tensor.name]
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).reshape(-1, part.tensor.columns)
        assert torch.equal(part.gather(student.parameters[part.source.parameter].detach()), values[part.rows])
        error = values[part.rows].double() - part.gather(full[part.source.parameter].detach()).double()
        assert part.geometry().energy == pytest.approx(float(error.square().sum()), rel=1e-4)

    few = [tuple(token % 300 for token in sample) for sample in samples]
    drawn = setup.drawn_parts
    run = EndToEnd(setup.loaded, drawn, few, few[:4], QuantGuardOptions(steps=2, batch=4), setup.task, "fingerprint")
    assert all(0 < divergence < 10 for pair in run.run() for divergence in pair)
    scope = BlockScope(setup.loaded, drawn, few, few[:4], QuantGuardOptions(scope="block", steps=2, batch=4), setup.task)
    assert len(scope.run()) == len(parts)
    assert all(0 < last < 10 for _, last in scope.losses)
    _, losses = efrap_positions(setup.loaded, parts, few, EfrapOptions(steps=2), setup.task)
    assert len(losses) == len(parts)
