"""Temporary folders and half-written pieces of runs that were killed: the next run in that folder removes them."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from convert.outputs import sweep
from convert.scratch import scratch_folder, shared_path
from qguard_edge.verify.keep import WorkFolder

KILLED = """
import os, signal, sys
from pathlib import Path
from convert.scratch import scratch_folder, shared_path
with scratch_folder() as folder, shared_path(Path(sys.argv[1])) as temporary:
    (folder / "base.gguf").write_bytes(bytes(1000))
    temporary.write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(piece: Path, temporary: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(piece)]
    done = subprocess.run(command, check=False, env=os.environ | {"TMPDIR": str(temporary)})
    assert done.returncode == -signal.SIGKILL


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_scratch_folder_is_empty_and_goes(temporary: Path) -> None:
    with scratch_folder() as folder, scratch_folder() as other:
        assert folder.parent == other.parent == temporary
        assert list(folder.iterdir()) == []
        (folder / "x").write_text("x")
    assert list(temporary.iterdir()) == []


def test_the_next_run_sweeps_the_temporary_folder_and_the_pieces(temporary: Path, tmp_path: Path) -> None:
    """A base of gigabytes stayed in the temporary folder, a piece under a hidden name in the work folder of `verify -o`."""
    work = tmp_path / "work"
    work.mkdir()
    killed(work / "answers-k.json", temporary)
    assert len(list(work.iterdir())) == len(list(temporary.iterdir())) == 2
    WorkFolder(work)
    with scratch_folder():
        pass
    assert list(work.iterdir()) == list(temporary.iterdir()) == []


def test_what_another_user_left_stays(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many users write the temporary folder, and any of them may plant names there."""
    killed(tmp_path / "piece", temporary)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert sweep(temporary) == 0
    assert len(list(temporary.iterdir())) == 2


def test_a_lock_that_goes_meanwhile_is_none(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.outputs._names", lambda folder: [".qguard-gone.lock"])
    assert sweep(temporary) == 0


def test_two_runs_may_make_one_piece(tmp_path: Path) -> None:
    piece = tmp_path / "piece"
    with shared_path(piece) as first, shared_path(piece) as second:
        first.write_text("the same")
        second.write_text("the same")
    assert piece.read_text() == "the same"
    assert list(tmp_path.iterdir()) == [piece]
