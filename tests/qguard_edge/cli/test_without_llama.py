"""Where llama-cpp-python is not installed, commands that need it say so in one sentence; the others do their work."""

import subprocess
import sys
from pathlib import Path

from qguard_edge.lab.demo import MODEL

WORDS = (
    "['convert', BASE, '--to', 'q4_k', '-o', 'x.gguf'], ['verify', BASE, '--base', BASE], ['demo'], "
    "['compare', BASE, '--to', 'q4_k'], ['baseline', BASE, '-o', 'x.json']"
)


def test_commands_say_that_llama_cpp_is_missing_and_how_to_get_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['llama_cpp'] = None\n"  # importing it is an error now, as where it is not installed
        "from qguard_edge.cli import run\n"
        "BASE = sys.argv[1]\n"
        f"for words in ({WORDS}): assert run(words) == 2, words\n"
        "assert run(['inspect', BASE, '--json']) == 0\n"
    )
    command = [sys.executable, "-c", code, str(MODEL)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 5
    for line in errors:
        assert line.startswith("error: llama.cpp is missing")
        assert "compiler" in line
        assert "pip install llama-cpp-python" in line
    assert list(tmp_path.iterdir()) == []


def test_other_missing_modules_are_not_taken_for_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['gguf'] = None\nfrom qguard_edge.cli import run\nassert run(['inspect', sys.argv[1]]) == 2\n"
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    command = [sys.executable, "-c", code, str(tmp_path / "x.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "llama.cpp is missing" not in done.stderr
    assert "gguf" in done.stderr
