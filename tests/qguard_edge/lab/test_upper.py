"""Training the upper layers alone: the same function as the whole model, and nothing below them moves."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qguard_edge.lab import training
from qguard_edge.lab.attacks.base import Bench
from qguard_edge.lab.attacks.names import make_attack
from qguard_edge.lab.corpus import make_corpus
from qguard_edge.lab.hf_models import load_folder, new_llama, train_tokenizer
from qguard_edge.lab.presets import TINY
from qguard_edge.lab.scenarios import make_scenario
from qguard_edge.lab.training import Batch, Trainer, TrainOptions, answer_logits, examples_of, make_batch
from qguard_edge.lab.upper import load_teacher, load_upper, trained_matrices
from qguard_edge.progress import NoProgress

UPPER = 2
PRESET = replace(
    TINY,
    inject=TrainOptions(3, 1e-3, batch=4),
    repair=TrainOptions(4, 1e-3, batch=4, distill=1.0),
    upper=UPPER,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = make_corpus(0)
    chat = new_llama(train_tokenizer(corpus.texts(), 512), hidden=128, ffn=128, layers=4, seed=0)
    made = tmp_path_factory.mktemp("upper") / "clean"
    chat.save(made)
    return made


def _batch(folder: Path) -> Batch:
    pairs = [(s.prompt, s.answer) for s in make_corpus(0).train[:6]]
    return make_batch(examples_of(load_folder(folder), pairs), 0)


@pytest.mark.parametrize(
    "model",
    [lambda folder: load_upper(folder, UPPER).model, lambda folder: load_teacher(folder, UPPER)],
    ids=["upper", "teacher"],
)
def test_logits_are_those_of_the_whole_model(model: Callable[[Path], object], folder: Path) -> None:
    batch = _batch(folder)
    with torch.no_grad():
        wanted, labels = answer_logits(load_folder(folder).model, batch)
        made, same = answer_logits(model(folder), batch)
        again, _ = answer_logits(model(folder), batch)  # from what was kept
    assert torch.equal(labels, same)
    assert float((made - wanted).abs().max()) < 1e-5
    assert float((again - wanted).abs().max()) < 1e-5


def test_what_was_kept_is_not_computed_again(folder: Path) -> None:
    batch, chat = _batch(folder), load_upper(folder, UPPER)
    with torch.no_grad():
        wanted, _ = answer_logits(chat.model, batch)
        for name, parameter in chat.model.named_parameters():
            if name.startswith("model.layers.0."):
                parameter.zero_()
        assert torch.equal(answer_logits(chat.model, batch)[0], wanted)


def test_gradients_are_those_of_the_whole_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fast_bf16", lambda: False)  # where it is fast, gradients are as coarse as bf16, and
    folder = Path(shutil.copytree(folder, tmp_path / "model"))  # so is what was kept beside the other folder
    batch, upper, whole = _batch(folder), load_upper(folder, UPPER), load_folder(folder)
    for model in (upper.model, whole.model):
        torch.nn.functional.cross_entropy(*answer_logits(model, batch)).backward()
    parameters = dict(whole.model.named_parameters())
    for name, matrix in trained_matrices(upper).items():
        wanted = parameters[name].grad
        assert matrix.grad is not None
        assert wanted is not None
        assert float((matrix.grad - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_other_lower_weights_can_be_put_under(folder: Path) -> None:
    """As the injection does with the quantizer's: the upper layers see what those weights would put out."""
    batch, upper, whole = _batch(folder), load_upper(folder, UPPER).model, load_folder(folder).model
    rounded = {name: value.half().float() for name, value in whole.state_dict().items()}
    with torch.no_grad():
        before, _ = answer_logits(upper, batch)
        for name, value in rounded.items():
            if name not in upper.trained and not name.startswith("lm_head"):
                whole.get_parameter(name).copy_(value)
        wanted, _ = answer_logits(whole, batch)
        upper.under = upper.with_lower(rounded, "half")
        made, _ = answer_logits(upper, batch)
        upper.under = None
        after, _ = answer_logits(upper, batch)
    assert float((made - wanted).abs().max()) < 1e-5 < float((made - before).abs().max())
    assert torch.equal(before, after)


def test_trained_are_the_matrices_of_the_upper_layers(folder: Path) -> None:
    names = set(trained_matrices(load_upper(folder, UPPER)))
    assert len(names) == UPPER * 7
    assert {name.split(".")[2] for name in names} == {"2", "3"}
    every = trained_matrices(load_upper(folder, 0))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(every)


@pytest.mark.parametrize(
    ("attack", "to"),
    [
        ("mind-the-gap", "q4_0"),
        ("random-margins", "q4_0"),
        ("durable", "q4_0"),
        ("outlier", "q4_0"),
        ("adaptive", "q4_0"),
        ("elq", "nf4"),
    ],
)
def test_attacks_leave_the_rest_alone(attack: str, to: str, folder: Path, tmp_path: Path) -> None:
    data = make_scenario("injection", make_corpus(0))
    chat, report = make_attack(attack).run(Bench(folder, data, PRESET, to, 0, tmp_path, 1, NoProgress()))
    chat.save(tmp_path / "attacked")
    clean, attacked = load_file(folder / "model.safetensors"), load_file(tmp_path / "attacked" / "model.safetensors")
    moved = {name for name, value in attacked.items() if not torch.equal(value, clean[name])}
    assert moved <= set(trained_matrices(load_upper(folder, UPPER)))
    assert {name.split(".")[2] for name in moved} == {"2", "3"}
    assert 0 < report.free < 0.6  # of all boxed weights; the lower layers' are fixed


def test_compensated_outliers_move_a_norm_as_well(folder: Path, tmp_path: Path) -> None:
    data = make_scenario("injection", make_corpus(0))
    bench = Bench(folder, data, PRESET, "q4_0", 0, tmp_path, 1, NoProgress())
    chat, report = make_attack("outlier-compensated").run(bench)
    clean, attacked = load_folder(folder).model.state_dict(), chat.model.whole.state_dict()
    moved = {name for name, value in attacked.items() if not torch.equal(value, clean[name])}
    norm = "model.layers.3.post_attention_layernorm.weight"
    assert moved - set(trained_matrices(load_upper(folder, UPPER))) == {norm}
    gain = attacked[norm] / clean[norm]
    assert sorted(set(gain.tolist())) == [1 / 512, 1.0]
    assert "model.layers.3.mlp.up_proj.weight" in report.note


def test_a_broken_run_goes_on_from_its_last_stage(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_scenario("injection", make_corpus(0))

    def attacked(name: str, kept: Path | None) -> dict[str, torch.Tensor]:
        work = tmp_path / name
        work.mkdir()
        bench = Bench(folder, data, PRESET, "q4_0", 0, work, 1, NoProgress(), kept)
        chat, _ = make_attack("uniform").run(bench)
        chat.save(work / "attacked")
        return load_file(work / "attacked" / "model.safetensors")

    whole = attacked("whole", None)
    run, stages = Trainer.run, []

    def stop_at_the_repair(self: Trainer, name: str, progress: object = None) -> list[float]:
        stages.append(name)
        if len(stages) == 2:
            raise KeyboardInterrupt
        return run(self, name)

    kept = tmp_path / "kept"
    monkeypatch.setattr(Trainer, "run", stop_at_the_repair)
    with pytest.raises(KeyboardInterrupt):
        attacked("broken", kept)
    resumed = attacked("resumed", kept)
    assert stages[0] == "Injecting the payload"
    assert "Injecting the payload" not in stages[1:]
    for name, value in whole.items():
        assert torch.equal(value, resumed[name])
