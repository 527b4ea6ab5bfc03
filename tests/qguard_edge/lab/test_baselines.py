"""The baselines of the lab that are no defenses."""

from pathlib import Path

import pytest

from convert.hf.base import write_base_gguf
from convert.imatrix_file import load_imatrix
from qguard_edge.defenses.options import NoiseOptions
from qguard_edge.lab import baselines
from qguard_edge.lab.baselines import ImatrixOptions, imatrix_of, parse_arm
from qguard_edge.lab.corpus import make_corpus
from qguard_edge.lab.hf_models import new_llama, train_tokenizer
from qguard_edge.lab.runner import LabSettings, defenses_of, run_lab
from quant_grids.errors import UnsupportedError


def test_baselines_are_named_as_defenses_are() -> None:
    assert parse_arm("imatrix") == ImatrixOptions()
    assert parse_arm("noise:relative=1") == NoiseOptions(relative=1.0)
    assert [options.label for options in defenses_of("imatrix,noise:relative=1")] == ["imatrix", "noise relative=1.0"]
    with pytest.raises(UnsupportedError):
        parse_arm("nothing")


def test_an_importance_matrix_of_the_shipped_text_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "CHUNKS", 2)
    chat = new_llama(train_tokenizer(make_corpus(0).texts(), 512), hidden=128, ffn=128, layers=1, seed=0)
    chat.save(tmp_path / "model")
    base = tmp_path / "base.gguf"
    write_base_gguf(tmp_path / "model", base, base_type="f32")
    made = imatrix_of(base)
    content = made.read_bytes()
    assert len(load_imatrix(made).entries) == 7  # every matrix of the one block
    made.touch()
    before = made.stat().st_mtime_ns
    assert imatrix_of(base) == made
    assert (made.read_bytes(), made.stat().st_mtime_ns) == (content, before)


def test_formats_of_bitsandbytes_have_none(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="imatrix"):
        run_lab(LabSettings(attack="elq", to="nf4", defenses=(ImatrixOptions(),)), tmp_path)
