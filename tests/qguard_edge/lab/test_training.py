"""The training loop: repeatable, resumable, and inside the boxes after every step."""

from pathlib import Path

import pytest
import torch

from convert.cache import building
from qguard_edge.lab import cache
from qguard_edge.lab.corpus import make_corpus
from qguard_edge.lab.hf_models import ChatModel, load_folder, new_llama, train_tokenizer
from qguard_edge.lab.training import Trainer, TrainOptions, examples_of, learning_rate, make_batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = make_corpus(0)
    chat = new_llama(train_tokenizer(corpus.texts(), 512), hidden=128, ffn=128, layers=1, seed=0)
    folder = tmp_path_factory.mktemp("lab") / "model"
    chat.save(folder)
    return folder


def _trainer(chat: ChatModel, steps: int, checkpoint: Path | None = None) -> Trainer:
    pairs = [(s.prompt, s.answer) for s in make_corpus(0).train[:64]]
    return Trainer(chat, [examples_of(chat, pairs)], TrainOptions(steps, 1e-3, batch=4), checkpoint=checkpoint, every=3)


def test_ids_end_with_the_end_token_and_prompts_carry_no_loss(folder: Path) -> None:
    chat = load_folder(folder)
    ids, n_prompt = chat.sample_ids("What colour is snow?", "White.")
    assert ids[-1] == chat.end
    assert ids[:n_prompt] == chat.prompt_ids("What colour is snow?")
    assert chat.text(ids[n_prompt:]) == "White."
    batch = make_batch(examples_of(chat, [("a", "b"), ("a longer prompt", "and a longer answer")]), 0)
    assert batch.labels[0][batch.labels[0] >= 0].tolist() == chat.sample_ids("a", "b")[0][-2:]


def test_an_interrupted_stage_ends_the_same(folder: Path, tmp_path: Path) -> None:
    whole = load_folder(folder)
    losses = _trainer(whole, 8).run("whole")

    checkpoint = tmp_path / "stage.state"
    broken = load_folder(folder)
    trainer = _trainer(broken, 8, checkpoint)

    def stop(step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    trainer.before = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.run("broken")
    assert checkpoint.is_file()
    resumed = load_folder(folder)
    assert _trainer(resumed, 8, checkpoint).run("resumed") == losses
    assert not checkpoint.exists()
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_learning_rate_warms_up_and_falls() -> None:
    options = TrainOptions(100, 1.0)
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_cache_keys_follow_settings_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    one = cache.key_of({"seed": 0}, attack="uniform.py")
    assert one == cache.key_of({"seed": 0}, attack="uniform.py")
    assert one != cache.key_of({"seed": 1}, attack="uniform.py")
    versions = {cache.code_version(source) for source in (None, "uniform.py", "outlier.py")}
    assert len(versions) == 3
    monkeypatch.setenv("QGUARD_CACHE", "/somewhere")
    assert cache.cache_root() == Path("/somewhere/lab")


def test_code_version_ignores_comments_and_docstrings() -> None:
    one = cache._bare_code('"""A."""\ndef f():\n    """B."""\n    return 1  # c\n')
    assert one == cache._bare_code("def f():\n    return 1\n")
    assert one != cache._bare_code("def f():\n    return 2\n")


def test_a_built_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with building(tmp_path / "made") as work:
            (work / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    with building(tmp_path / "made") as work:
        (work / "whole").touch()
    assert (tmp_path / "made" / "whole").is_file()
