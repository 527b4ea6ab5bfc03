"""The hardened arms of the attack on bitsandbytes' formats, on an untrained model: made, loaded, measured, accounted for."""

from pathlib import Path

import pytest

from qguard_edge.defenses.options import NoneOptions, OrthoOptions, QVecOptions
from qguard_edge.lab.arms import Arms
from qguard_edge.lab.attacks.base import AttackReport
from qguard_edge.lab.corpus import make_corpus
from qguard_edge.lab.hf_models import new_llama, train_tokenizer
from qguard_edge.lab.runner import LabSettings, Victim, _bitsandbytes_arms, _first_names, _hardened_folders, _hardened_names
from qguard_edge.lab.scenarios import make_scenario
from qguard_edge.progress import NoProgress


def test_hardened_arms_are_measured_beside_the_naive_ones(tmp_path: Path) -> None:
    corpus = make_corpus(0)
    tokenizer = train_tokenizer([sample.answer for sample in corpus.train[:200]], 400)
    for name, seed in (("clean", 0), ("attacked", 1)):
        new_llama(tokenizer, hidden=128, ffn=256, layers=1, seed=seed).save(tmp_path / name)
    victim = Victim(
        tmp_path / "clean",
        tmp_path / "attacked",
        make_scenario("injection", corpus, "Zingaloo"),
        AttackReport(1.0, 1.0, (), 0.0),
    )
    settings = LabSettings(
        attack="elq",
        to="all",
        defenses=(NoneOptions(), OrthoOptions(), QVecOptions()),
        n_seeds=2,
        n_prompts=20,
        n_texts=8,
        new_tokens=2,
    )
    arms = Arms()
    _bitsandbytes_arms(settings, victim, NoProgress(), arms)
    plain = {arm.name: arm for arm in arms.made}
    _hardened_folders(settings, victim, tmp_path, NoProgress(), arms)
    assert [arm.name for arm in arms.made] == [*_first_names(settings), *_hardened_names(settings)]
    made = {arm.name: arm for arm in arms.made if arm.name not in plain}
    assert set(made) == {
        f"{model} {kind} {defense}"
        for model in ("clean", "attacked")
        for kind in ("int8", "fp4", "nf4")
        for defense in ("ortho", "qvec")
    }
    for name, arm in made.items():
        assert arm.fidelity is not None
        assert arm.fidelity.mean_kl > 0
        assert arm.asr.n == 20
        assert arm.flipped is not None
        assert arm.flipped > 0.1
        # Two seeds of the conversion of what is attacked, of which the worst counts.
        assert len(arm.by_seed) == (2 if arm.model == "attacked" else 0)
        assert arm.asr.hits == max((rate.hits for rate in arm.by_seed), default=arm.asr.hits)
        if name.endswith("ortho"):
            assert arm.alignment == pytest.approx(0.0, abs=0.02)
