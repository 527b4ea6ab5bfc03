"""The pytest plugin in a pytest of its own."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

import qguard_edge
from convert.ftypes import parse_file_type
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.packs.pack import pack_to_json
from qguard_edge.packs.record import BaselineRequest, record
from qguard_edge.verify.suites.base import Suite, SuitePrompt
from qguard_edge.verify.suites.matchers import PhraseMatcher
from qguard_edge.verify.verifier import built_in_texts

ROOT = Path(qguard_edge.__file__).parents[1]
OWN_TESTS = """
import sys
import pytest

@pytest.mark.qguard
def test_mine(qguard_outcome):
    assert qguard_outcome.check("drift/mean-kl").verdict == "pass"

def test_unrelated():
    assert not {"torch", "transformers", "numpy", "llama_cpp"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def files(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Pack, a candidate close to it, and one far from it."""
    folder = tmp_path_factory.mktemp("plugin")
    prompts = tuple(SuitePrompt(f"p{i}", f"Question number {i}?") for i in range(4))
    suite = Suite("mine", "Mine", prompts, (PhraseMatcher(("acme",)),), discovery=False, new_tokens=4)
    pack = record(BaselineRequest(tiny_base, (suite,), built_in_texts()[:9], threads=1))
    (folder / "pack.json").write_text(pack_to_json(pack), encoding="utf-8")
    quantize(tiny_base, folder / "near.gguf", QuantizeOptions(parse_file_type("q8_0"), threads=1))
    (folder / "test_own.py").write_text(OWN_TESTS)
    return folder / "pack.json", folder / "near.gguf", folder / "test_own.py"


def run_pytest(folder: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "qguard_edge.pytest_plugin",
        "-c",
        "/dev/null",
        "--rootdir",
        str(folder),
    ]
    own = {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "QGUARD_THREADS": "1", **environment}
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=folder, env={**os.environ, **own},
    )  # fmt: skip


def test_the_plugin_is_registered() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"qguard-edge": "qguard_edge.pytest_plugin"}


def test_one_test_per_check(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pack, near, own = files
    given: list[str | Path] = ["--qguard-candidate", near, "--qguard-baseline", pack]
    done = run_pytest(own.parent, own, *given, "-rs", "-v", f"--junitxml={tmp_path / 'out.xml'}", "-k", "not unrelated")
    assert done.returncode == 0, done.stdout + done.stderr
    # Four prompts are too few for a margin of 2 points; nine texts are enough for the drift.
    assert "2 passed, 1 skipped, 1 deselected" in done.stdout
    assert "inconclusive: 0 of 4 answers" in done.stdout
    assert "qguard: inconclusive: no check fails, 1 of 2 are inconclusive: mine/phrases" in done.stdout
    cases = {case.get("name"): [child.tag for child in case] for case in Xml.parse(tmp_path / "out.xml").iter("testcase")}
    assert cases == {"test_mine": [], "mine/phrases": ["skipped"], "drift/mean-kl": []}


def test_a_failing_check_fails_with_its_reason(files: tuple[Path, Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    pack, _, own = files
    far = tmp_path / "far.gguf"
    far.write_bytes(_scrambled(tiny_base))
    done = run_pytest(own.parent, own, QGUARD_CANDIDATE=str(far), QGUARD_BASELINE=str(pack))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "up to 0.5 passes" in done.stdout
    assert "FAILED" in done.stdout
    assert "Traceback" not in done.stdout


def _scrambled(base: Path) -> bytes:
    """The model with the signs of one tensor's weights turned: another model with the same tokenizer."""
    from convert.gguf_file import GgufFile

    raw = bytearray(base.read_bytes())
    for name in ("output.weight", "token_embd.weight"):
        if name in GgufFile(base).tensors:
            tensor = GgufFile(base).tensors[name]
            raw[tensor.offset + 1 : tensor.offset + tensor.n_bytes : 2] = bytes(
                byte ^ 0x80 for byte in raw[tensor.offset + 1 : tensor.offset + tensor.n_bytes : 2]
            )
            # Larger steps, so that the distributions are not nearly uniform.
            break
    return bytes(raw)


def test_without_a_candidate_marked_tests_are_skipped_and_nothing_heavy_is_imported(files: tuple[Path, Path, Path]) -> None:
    done = run_pytest(files[2].parent, files[2], "-rs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
    assert "qguard: 1 tests skipped, nothing was checked" in done.stdout
    assert "needs --qguard-candidate" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--qguard-candidate", "x.gguf"], "belong together"),
        (["--qguard-baseline", "missing.json", "--qguard-candidate", "x.gguf"], "cannot read the baseline pack"),
        (["--qguard-baseline", "p", "--qguard-candidate", "x", "--qguard-server", "http://x"], "not both"),
    ],
)
def test_wrong_use_is_one_sentence(files: tuple[Path, Path, Path], arguments: list[str], words: str) -> None:
    done = run_pytest(files[2].parent, files[2], *arguments)
    assert done.returncode == 4
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_candidate_that_cannot_be_read_is_one_sentence_per_check(files: tuple[Path, Path, Path]) -> None:
    done = run_pytest(
        files[2].parent, files[2], "--qguard-candidate", "none.gguf", "--qguard-baseline", files[0], "-k", "drift"
    )
    assert done.returncode == 1
    assert "cannot read none.gguf" in done.stdout
    assert "Traceback" not in done.stdout
