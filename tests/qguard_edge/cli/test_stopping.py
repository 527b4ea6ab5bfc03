"""Told to stop, a command cleans up, says so and ends with 128 + the signal's number; no child outlives it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convert.child import child_command
from convert.ftypes import parse_file_type
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.cli.stopping import StoppedError, leaving
from tests.helpers.command import program

STUCK = """
import sys, time
from pathlib import Path
from convert.atomic import work_folder
from convert.outputs import reserve
from qguard_edge import cli
from qguard_edge.cli import stopping
stopping.GRACE = float(sys.argv[2])
def run(arguments):
    out = Path(sys.argv[1])
    with reserve([out]), work_folder(out):
        ready = False
        while True:
            try:
                if not ready:
                    ready = True
                    print("ready", flush=True)
                time.sleep(60)
            except BaseException:
                pass  # as a callback of C code would
cli.run = run
cli.main(["convert", "--json"])
"""


def wait_for(path: Path, pattern: str, child: "subprocess.Popen[str]") -> None:
    for _ in range(600):
        if any(path.glob(pattern)) or child.poll() is not None:
            return
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_leaves_nothing(name: str, tiny_base: Path, tmp_path: Path) -> None:
    command = program("convert", tiny_base, "--to", "q4_k", "-o", tmp_path / "o.gguf", "--threads", "1", "--json")
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path, ".qguard-*.work", child)
    number = signal.Signals[name]
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert f"stopped by {name}" in err
    assert "Traceback" not in err
    assert json.loads(out)["status"] == "error"
    assert not [path for path in tmp_path.iterdir() if path.name != ".o.gguf.activations"]


def test_a_stopped_verification_says_what_is_kept(tiny_base: Path, tmp_path: Path) -> None:
    """It said that nothing was left behind, though the same command went on from the answers."""
    quantize(tiny_base, tmp_path / "q.gguf", QuantizeOptions(parse_file_type("q4_0"), threads=1))
    command = program("verify", "q.gguf", "--base", tiny_base, "--threads", "1", "-o", "report")
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    wait_for(tmp_path, "report/work/*", child)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "error: stopped by SIGINT; answers so far are kept in report/work; the same command goes on from there" in err
    assert "nothing was left" not in err


def test_without_a_word_of_the_command_nothing_was_left() -> None:
    for what, said in (("", "nothing was left behind"), ("a thing is kept", "a thing is kept")):
        with pytest.raises(StoppedError, match=f"stopped by SIGINT; {said}"), leaving(what):
            raise StoppedError(signal.SIGINT)


@pytest.mark.parametrize(("grace", "signals"), [(0.2, 1), (60.0, 2)], ids=["in time", "twice"])
def test_a_main_thread_that_does_not_hear_is_not_waited_for(grace: float, signals: int, tmp_path: Path) -> None:
    """SIGINT was swallowed once in 32: raised where Python drops exceptions."""
    command = [sys.executable, "-c", STUCK, str(tmp_path / "out"), str(grace)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    for _ in range(signals):
        child.send_signal(signal.SIGINT)
        time.sleep(0.1)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "stopped by SIGINT" in err
    assert json.loads(out)["status"] == "error"
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_the_caller_ignores_stays_ignored(tmp_path: Path) -> None:
    """`nohup qguard-edge ...`: a closed terminal must not end it."""
    code = (
        "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from qguard_edge import cli\n"
        "cli.run = lambda arguments: os.kill(os.getpid(), signal.SIGHUP) or 0\n"
        "cli.main([])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_child_whose_parent_is_gone_does_not_begin(tmp_path: Path) -> None:
    command = child_command("json.tool", "--help")
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    gone = [str(os.getppid()) if part == str(os.getpid()) else part for part in command]
    done = subprocess.run(gone, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stdout == b""


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    """One quantize worker outlived its parent, which was killed while the worker was still importing."""
    (tmp_path / "idle.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    code = "import subprocess\nfrom convert.child import child_command\nsubprocess.run(child_command('idle'))\n"
    environment = os.environ | {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{tmp_path}"}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child lives on")
