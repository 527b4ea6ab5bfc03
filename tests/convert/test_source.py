"""Nothing contacts a hub unless the argument is a hub id and no path, and `--offline` is not given."""

from pathlib import Path

import pytest

from convert import source
from convert.missing import SourceError
from convert.source import OFFLINE, resolve_source
from qguard_edge.cli import run
from qguard_edge.runtimes.hf import HfLoadError, load_hf_model


class AskedError(Exception):
    """The hub was asked."""


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, revision: str | None) -> Path:
        raise AskedError(repo, revision)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(OFFLINE, raising=False)
    monkeypatch.setattr(source, "_download", download)
    (tmp_path / "models").mkdir()


@pytest.mark.parametrize("model", ["owner/name", "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B", "a/b_c.d-e"])
def test_a_hub_id_is_asked_for(model: str) -> None:
    with pytest.raises(AskedError):
        resolve_source(model)


@pytest.mark.parametrize(
    "model",
    ["models/x", "./model", "models/x.gguf", "owner/x.gguf", "owner/x.safetensors", "~/x", "../x", "/x/y", "a/b/c", "a\\b/c",
     "owner/", "/name", "name", "a b/c", "https://x/y", "a/../b", "a/..", "-a/b", "a//b", "a--b/c", "\u0430/b"],
)  # fmt: skip
def test_what_looks_like_a_path_is_none(model: str) -> None:
    """A mistyped `models/x` went to the hub, and so told it the name."""
    with pytest.raises(SourceError, match=r"not a hub id|neither a folder|there is no file"):
        resolve_source(model)


def test_offline_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OFFLINE, "1")
    with pytest.raises(SourceError, match="--offline does not let the hub be asked"):
        resolve_source("owner/name")


def test_the_flag_is_before_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (OFFLINE, "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    for arguments in (["convert", "owner/name", "--to", "q4_0"], ["scan", "owner/name"]):
        assert run(["--offline", *arguments]) == 2
        assert "--offline" in capsys.readouterr().err


def test_transformers_gets_no_path_that_it_could_take_for_an_id() -> None:
    with pytest.raises(HfLoadError, match="there is no model at"):
        load_hf_model(Path("owner/name"))
