"""The paths that a command writes: checked together, held for the run, and what a killed run left is swept."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.atomic import OutputError, atomic_path, commit_folder, temporary_beside, work_folder
from convert.outputs import Written, check_outputs, reserve, sweep, writing

KILLED = """
import os, signal, sys
from pathlib import Path
from convert.atomic import atomic_path, work_folder
from convert.outputs import reserve
out = Path(sys.argv[1])
with reserve([out]), work_folder(out) as work, atomic_path(out) as temporary:
    (work / "base.gguf").write_bytes(bytes(1000))
    temporary.write_bytes(bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".qguard-"))


def place_file(path: Path) -> None:
    path.write_text("precious")


def place_link(path: Path) -> None:
    path.symlink_to(path.with_name("precious"))
    path.with_name("precious").write_text("precious")


def place_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("place", [place_file, place_link, place_dangling_link])
def test_what_exists_is_replaced_only_when_asked(tmp_path: Path, place: Callable[[Path], None]) -> None:
    path = tmp_path / "out"
    place(path)
    with pytest.raises(OutputError, match="pass --overwrite to replace it or choose another with --report"):
        check_outputs([Written(path, "--report")], [], overwrite=False)
    check_outputs([Written(path, "--report")], [], overwrite=True)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_a_folder_or_fifo_is_never_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "out")
    with pytest.raises(OutputError, match=r"is a folder|not a regular file"):
        check_outputs([Written(tmp_path / "out")], [], overwrite=True)


def test_no_input_is_written_however_it_is_called(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    base.write_text("precious")
    (tmp_path / "link.gguf").symlink_to(base)
    os.link(base, tmp_path / "hard.gguf")
    (tmp_path / "sub").symlink_to(tmp_path)
    for name in ("base.gguf", "link.gguf", "hard.gguf", "sub/base.gguf", "sub/./base.gguf"):
        with pytest.raises(OutputError, match="same file"):
            check_outputs([Written(tmp_path / name)], [None, "owner/name", base], overwrite=True)


def test_files_of_a_folder_and_shards_are_inputs(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model-Q4_K_M.gguf"):
        (model / name).write_text("{}")
    check_outputs([Written(model / "model-Q4_K_M.gguf")], [model], overwrite=True)
    with pytest.raises(OutputError, match="same file"):
        check_outputs([Written(model / "config.json")], [model], overwrite=True)
    shards = [tmp_path / f"m[1]-0000{i}-of-00002.gguf" for i in (1, 2)]
    for shard in shards:
        shard.write_text("GGUF")
    with pytest.raises(OutputError, match="same file"):
        check_outputs([Written(shards[1])], [shards[0]], overwrite=True)


def test_outputs_are_not_each_other(tmp_path: Path) -> None:
    (tmp_path / "sub").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="--outfile and --report are the same file"):
        check_outputs([Written(tmp_path / "out"), Written(tmp_path / "sub" / "out", "--report")], [], overwrite=True)
    with (
        reserve([tmp_path / "out"]),
        pytest.raises(OutputError, match="written already"),
        reserve([tmp_path / "sub" / "out"]),
    ):
        pass


def test_a_name_is_held_for_the_run_and_free_afterwards(tmp_path: Path) -> None:
    out, code = tmp_path / "out", KILLED.replace("SIGKILL", "SIGCONT")
    other = [sys.executable, "-c", code, str(out)]
    with writing([Written(out)], [], overwrite=False):
        refused = subprocess.run(other, capture_output=True, text=True, check=False)
        assert "out is being written already" in refused.stderr
        sweep(tmp_path)
        assert hidden(tmp_path) == [".qguard-out.lock"]
    assert subprocess.run(other, check=False).returncode == 0
    assert out.read_bytes() == bytes(1000)
    assert hidden(tmp_path) == []


def test_a_run_that_ended_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both checks came before the first run was done; the second run took the name only then."""
    out = tmp_path / "out"
    monkeypatch.setattr("convert.outputs.sweep", lambda folder: out.write_text("the first run's"))
    with pytest.raises(OutputError, match="--overwrite"), writing([Written(out)], [], overwrite=False):
        pass
    assert out.read_text() == "the first run's"


@pytest.mark.parametrize("name", ["out.gguf", "x" * 250])
def test_the_next_run_sweeps_what_a_killed_one_left(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    out, foreign = tmp_path / name, tmp_path / ".qguard-mine"
    foreign.mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(hidden(tmp_path)) == 4
    with reserve([tmp_path / "another"]):
        assert hidden(tmp_path) == [".qguard-another.lock", ".qguard-mine"]
    assert [record.getMessage() for record in caplog.records] == [
        "removed 2 unfinished files (0.0 MB) of runs that were killed"
    ]


def test_what_a_living_run_works_on_is_not_swept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with reserve([out]), work_folder(out) as work, atomic_path(out) as temporary:
        temporary.write_text("1")
        with reserve([tmp_path / "another"]):
            assert work.is_dir()
            assert temporary.is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_folder_that_was_being_replaced_gets_its_name_back(tmp_path: Path) -> None:
    """A kill between the two renames of `commit_folder`: neither the old folder nor the new one has the name."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    out.rename(temporary_beside(out, "old"))
    (tmp_path / ".qguard-out.lock").touch()
    assert sweep(tmp_path) == 0
    assert (out / "config.json").read_text() == "old"
    with work_folder(out) as work:
        (work / "made").mkdir()
        commit_folder(work / "made", out)
    assert list(out.iterdir()) == []
    assert hidden(tmp_path) == []
