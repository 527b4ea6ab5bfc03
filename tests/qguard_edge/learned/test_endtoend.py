"""The learning loop: it lowers the loss, one seed gives one plan, and a resumed run ends where an uninterrupted one does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qguard_edge.defenses.options import QuantGuardOptions
from qguard_edge.learned.checkpoint import checkpoint_seed, load_checkpoint, read_header
from qguard_edge.learned.constraint import alignment_of
from qguard_edge.learned.devices import device_map, learning_devices
from qguard_edge.learned.endtoend import EndToEnd, batch_of, batch_size, rate_at
from qguard_edge.runtimes.hf import load_hf_model
from tests.helpers.learned_setup import Setup

Samples = list[tuple[int, ...]]


def learn(
    setup: Setup, samples: Samples, options: QuantGuardOptions, checkpoint: Path | None = None, seed: int = 7
) -> EndToEnd:
    task = setup.again(checkpoint=checkpoint, seed=seed)
    return EndToEnd(setup.loaded, setup.drawn_parts, samples, samples[:6], options, task, "fingerprint")


def same(first: EndToEnd, second: EndToEnd) -> bool:
    """Whether two runs ended at the same plan, and with the same variables."""
    variables = zip(first.variables, second.variables, strict=True)
    return all(map(torch.equal, first.best, second.best)) and all(torch.equal(a.h, b.h) for a, b in variables)


@pytest.mark.training
def test_one_seed_one_plan(setup: Setup, samples: Samples) -> None:
    options = QuantGuardOptions(steps=3, batch=4, rate=0.1)
    first, again, other = (learn(setup, samples, options, seed=seed) for seed in (7, 7, 8))
    assert first.run() == again.run()
    assert same(first, again)
    other.run()
    assert not same(first, other)


@pytest.mark.training
def test_learning_lowers_the_divergence_under_the_constraint(setup: Setup, samples: Samples) -> None:
    run = learn(setup, samples, QuantGuardOptions(steps=30, batch=16, rate=0.01))
    losses = run.run()
    assert losses[-1][0] < 0.8 * losses[0][0]
    assert losses[-1][1] == run.least < losses[0][1]
    for part, one, plan in zip(setup.drawn_parts, run.variables, run.best, strict=True):
        geometry = part.geometry()
        assert plan.any()
        assert torch.equal(plan, one.plan), "the last plan is the best here"
        limit = max(one.target, geometry.left / geometry.energy)
        assert alignment_of(plan, geometry) <= limit + 1e-6
    wanted = sum(int(one.wanted().sum()) for one in run.variables)
    assert wanted > sum(int(plan.sum()) for plan in run.best)


@pytest.mark.training
def test_steps_that_do_harm_are_not_taken(setup: Setup, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uphill instead of down: the divergence grows, and the drawn codes stay."""
    run = learn(setup, samples, QuantGuardOptions(steps=10, batch=8, rate=0.05))
    monkeypatch.setattr("qguard_edge.learned.endtoend.CHECK_EVERY", 2)
    for one in run.variables:
        step = one.step
        monkeypatch.setattr(one, "step", lambda slope, rate, step=step: step(-slope, rate))
    losses = run.run()
    assert losses[-1][1] > run.least
    assert all(bool(one.plan.any()) for one in run.variables)
    assert not any(bool(plan.any()) for plan in run.best)


class _KilledError(Exception):
    pass


@pytest.mark.training
def test_a_resumed_run_ends_at_the_same_plan(
    setup: Setup, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = QuantGuardOptions(steps=8, batch=4, rate=0.05)
    monkeypatch.setattr("qguard_edge.learned.endtoend.CHECK_EVERY", 3)
    whole = learn(setup, samples, options)
    whole.run()

    path = tmp_path / "state.checkpoint"
    monkeypatch.setattr("qguard_edge.learned.endtoend.SAVE_SECONDS", 0.0)  # save after every step
    killed = learn(setup, samples, options, path)
    step = killed._step

    def fail_in_the_sixth(number: int) -> float:
        if number == 5:
            raise _KilledError
        return step(number)

    monkeypatch.setattr(killed, "_step", fail_in_the_sixth)
    with pytest.raises(_KilledError):
        killed.run()
    header = read_header(path)
    assert header is not None
    assert header["step"] == "5"
    assert checkpoint_seed(path) == 7

    resumed = learn(setup, samples, options, path)
    taken: list[int] = []
    step = resumed._step

    def noted(number: int) -> Any:
        taken.append(number)
        return step(number)

    monkeypatch.setattr(resumed, "_step", noted)
    assert resumed.run() == whole.losses
    assert taken == [5, 6, 7]
    assert same(resumed, whole)
    assert resumed.least == whole.least


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(
    setup: Setup, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    path = tmp_path / "state.checkpoint"
    run = learn(setup, samples, QuantGuardOptions(steps=8, batch=4), path)
    step = run._step

    def interrupt(number: int) -> float:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(number)

    monkeypatch.setattr(run, "_step", interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert signal.getsignal(signal.SIGINT) is before
    state = load_checkpoint(path, "fingerprint")
    assert state is not None
    assert state.step == 3
    assert load_checkpoint(path, "of another conversion") is None


def test_a_broken_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "broken"
    for content in (b"", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0not json at all."):
        path.write_bytes(content)
        assert read_header(path) is None
        assert load_checkpoint(path, "x") is None
        assert checkpoint_seed(path) is None
    assert checkpoint_seed(tmp_path / "missing") is None


def test_batches_cover_the_text_and_depend_on_seed_and_step_only(samples: Samples) -> None:
    def chosen(seed: int, steps: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(row.tolist()) for step in steps for row in batch_of(samples, 4, seed, step).ids]

    assert sorted(chosen(1, range(4))) == sorted(samples)  # one pass
    assert chosen(1, range(4, 8)) != chosen(1, range(4))
    assert chosen(1, [6]) == chosen(1, [6])
    assert chosen(1, range(4)) != chosen(2, range(4))
    ragged = batch_of([(1, 2, 3), (4, 5)], 2, 0, 0)
    assert ragged.mask.sum(1).sort().values.tolist() == [2, 3]


def test_short_texts_are_taken_more_at_a_time(samples: Samples) -> None:
    assert batch_size(samples, QuantGuardOptions(batch=3)) == 3
    assert batch_size(samples, QuantGuardOptions()) == len(samples)  # 16 texts of 20 tokens are all there is
    assert batch_size([tuple(range(40))] * 100, QuantGuardOptions()) == 26
    assert batch_size([tuple(range(4096))] * 5, QuantGuardOptions()) == 1


def test_the_step_falls_as_the_schedule_says() -> None:
    options = {name: QuantGuardOptions(steps=10, rate=0.1, schedule=name) for name in ("linear", "constant", "cosine")}
    assert [rate_at(step, options["linear"]) for step in (0, 5)] == pytest.approx([0.1, 0.05])
    assert [rate_at(step, options["constant"]) for step in (0, 9)] == pytest.approx([0.1, 0.1])
    assert rate_at(5, options["cosine"]) == pytest.approx(0.05)


@pytest.mark.training
def test_recomputing_activations_changes_nothing(setup: Setup, samples: Samples) -> None:
    plain = learn(setup, samples, QuantGuardOptions(steps=2, batch=4))
    saving = learn(setup, samples, QuantGuardOptions(steps=2, batch=4, checkpointing=True))
    assert torch.allclose(torch.tensor(plain.run()), torch.tensor(saving.run()), rtol=1e-3)


@pytest.mark.training
def test_a_model_spread_over_devices_learns_the_same(
    setup: Setup, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two devices that are the same processor: accelerate's hooks around every module, and gradients through them."""
    options, cpu = QuantGuardOptions(steps=3, batch=4, rate=0.1), torch.device("cpu")
    alone = learn(setup, samples, options)
    losses = alone.run()
    monkeypatch.setattr("qguard_edge.learned.endtoend.learning_devices", lambda device: (device, device))
    loaded = load_hf_model(setup.task.model)
    spread = EndToEnd(loaded, setup.drawn_parts, samples, samples[:6], options, setup.task, "fingerprint")
    for model in (spread.teacher, spread.student.model):
        assert set(model.hf_device_map.values()) == {cpu}
        assert all(hasattr(block, "_hf_hook") for block in model.model.layers)
    assert spread.run() == losses
    assert same(spread, alone)


def test_blocks_are_dealt_out_in_order(setup: Setup) -> None:
    devices = [torch.device("cuda", index) for index in range(2)]
    loaded = load_hf_model(setup.task.model)
    found = dict(device_map(loaded.model, devices))
    blocks = [found[f"model.layers.{index}"].index for index in range(loaded.layers)]
    assert blocks == sorted(blocks)
    assert blocks[0] == 0
    assert blocks[-1] == 1
    covered = {name for name, _ in loaded.model.named_parameters()}
    assert all(any(name.startswith(f"{module}.") for module in found) for name in covered)
    tied = loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert found["lm_head"].index == (0 if tied else 1)
    assert learning_devices(torch.device("cpu")) == (torch.device("cpu"),)
    assert learning_devices(torch.device("cuda", 1)) == (torch.device("cuda", 1),)
