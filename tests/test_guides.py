"""What the tutorials and guides tell to type is typed here, page by page, on the tiny model.

Left out is what needs another machine or a registry (`ELSEWHERE`). Commands that run a model get options that make them short
(`SHORT`): few prompts decide nothing, so a verdict may be inconclusive; a message instead of a verdict is a failure.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convert.ftypes import parse_file_type
from convert.quantizer import QuantizeOptions, quantize
from tests.helpers.command import Done, command_line
from tests.helpers.loopback_hub import loopback_hub

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    *(
        str(path.relative_to(ROOT))
        for folder in ("tutorial", "howto")
        for path in sorted((ROOT / "docs" / folder).glob("*.md"))
    ),
    "docs/scan.md",
    "docs/verification-packs.md",
    "docs/moved-base.md",
]
ELSEWHERE = {
    "pip", "adb", "python",  # registries, a phone, the studies
    "make",  # the suite itself
    "llama-quantize",  # in tests/qguard_edge/conversion/test_moved_gguf.py, by its library
}  # fmt: skip
SHORT = {
    "convert": ["--calib-samples", "2", "--no-fidelity", "--threads", "1", "--overwrite"],
    "verify": ["--max-prompts", "4", "--threads", "1", "--suites", "injection", "--overwrite"],
    "baseline": ["--max-prompts", "4", "--threads", "1", "--suites", "injection", "--overwrite"],
    "check": ["--max-prompts", "4", "--overwrite"],
    "compare": ["--defenses", "none,ortho", "--threads", "1", "--overwrite"],
    "scan": ["--threads", "1", "--overwrite"],
}
NOT_HERE = {
    "demo": "in tests/qguard_edge/cli/test_demo.py",
    "lab": "trains",
    "converter": "asks a registry",
    "--install-completion": "changes the shell of whoever runs the tests",
}
JUDGES = {"verify", "check", "pytest"}


def commands(text: str) -> list[list[str]]:
    """The words of each command of the shell blocks in a page, comments and prompts left out."""
    found = []
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if kind in ("", "console", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                found += [words] if words else []
    return found


def test_commands_are_found() -> None:
    text = "```\n$ a b \\\n   c # d\n\n# e\nf\n```\n```python\nno()\n```\n"
    assert commands(text) == [["a", "b", "c"], ["f"]]


@pytest.fixture
def desk(tiny_folder: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the pages take for granted, under the names that they use."""
    for name in ("MyModel", "Model", "model"):
        shutil.copytree(tiny_folder, tmp_path / name)
    shutil.copy(tiny_base, tmp_path / "model-bf16.gguf")
    quantize(tiny_base, tmp_path / "model-Q4_K_M.gguf", QuantizeOptions(parse_file_type("q4_k"), threads=1))
    (tmp_path / "my.txt").write_text("The cat sat on the mat.\n\nThe dog sat on the log.\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_tells_to_type_works(page: str, desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cli = command_line(capfd)
    ran = 0
    for words in commands((ROOT / page).read_text()):
        program, *arguments = words
        if program in ELSEWHERE:
            continue
        assert program in ("qguard-edge", "pytest", "hf"), words
        if program == "pytest":
            done = pytest_here(arguments, desk)
        elif program == "hf":
            done = hf_here(arguments, desk)
        elif arguments[0] in NOT_HERE or "--server" in arguments:  # servers: tests/qguard_edge/packs/test_server.py
            continue
        else:
            short = [f"{word}=drift" if word == "--verify" else word for word in arguments]
            done = cli(*short, *SHORT.get(arguments[0], []))
        judges = program == "pytest" or arguments[0] in JUDGES or "--verify" in arguments
        assert done.returncode in ((0, 1, 3) if judges else (0,)), (words, done.stderr)
        ran += 1
    assert ran or page in ("docs/tutorial/phone.md", "docs/howto/install.md", "docs/howto/failing-verdict.md")


def hf_here(arguments: list[str], folder: Path) -> Done:
    """`hf`, with a hub on this machine in place of the real one."""
    with loopback_hub() as hub:
        there = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_none", "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"}
        command = [str(Path(sys.executable).with_name("hf")), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=os.environ | there)
        _, repository, name = arguments
        assert hub.files == {f"{repository}/{name}": (folder / name).read_bytes()}, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def pytest_here(arguments: list[str], folder: Path) -> Done:
    """pytest with the project's plugin, as a user runs it in a folder of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--qguard-limit", "4", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert "qguard::" in done.stdout or "passed" in done.stdout or "skipped" in done.stdout, done.stdout + done.stderr
    return Done(done.returncode, done.stdout, done.stderr)
