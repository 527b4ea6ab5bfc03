"""What several tests of conversions share: the converter that `qguard-edge converter install` fetches."""

import importlib.metadata
from pathlib import Path

import pytest
from filelock import FileLock

from convert.hf.installed import install


@pytest.fixture(scope="session")
def fetched_converter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the converter, one for all processes of a run. Nothing of this environment changes."""
    root = tmp_path_factory.getbasetemp()
    cache = (root.parent if root.name.startswith("popen") else root) / "converter-cache"
    before = {one.metadata["Name"] for one in importlib.metadata.distributions()}
    with FileLock(cache.with_suffix(".lock")), pytest.MonkeyPatch.context() as patch:
        patch.setenv("QGUARD_CACHE", str(cache))
        patch.setenv("PIP_USER", "1")  # must not send it elsewhere
        made = install()
    assert made.present
    assert not made.changed
    assert made.folder.is_relative_to(cache)
    assert {one.metadata["Name"] for one in importlib.metadata.distributions()} == before
    return cache


@pytest.fixture
def installed_converter(fetched_converter: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Conversions of this test find it."""
    monkeypatch.delenv("LLAMA_CPP_ROOT", raising=False)
    monkeypatch.setenv("QGUARD_CACHE", str(fetched_converter))
    return fetched_converter
