"""The documents are true: trees, tables, paths, links, commands and options that they name exist."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from docs_pages import anchor
from readme_picture import PICTURE, REAL_PICTURE, RESULTS, arms_of, distances, dots, draw_real, shares
from typer.main import get_command

from qguard_edge.cli import app
from qguard_edge.report.plots import save

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DESIGN = (ROOT / "docs" / "design.md").read_text()
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
TELLING_OF_BEFORE = {"CHANGELOG.md", "docs/LOG.md"}
"""Documents that name what is no more."""

TOP = ("quant_grids", "convert", "qguard_edge", "tests", "scripts", "docs")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(TOP)})/[\w./-]*\w")
OLD_WORDS = re.compile(r"(?i)\bnaive\b|--(?:keep-)?reference\b|\.reference\.gguf")


def block_after(text: str, heading: str) -> str:
    """The first code block below a heading."""
    return text.partition(f"## {heading}\n")[2].partition("```\n")[2].partition("\n```")[0]


def tree_of(text: str) -> dict[str, str]:
    """Paths in the tree of docs/design.md, with what stands beside each, continued lines included."""
    found: dict[str, str] = {}
    parent = path = ""
    for line in block_after(text, "How it is built").splitlines():
        if match := re.match(r"( {2})?([\w./]+)(?:\s+|$)", line):
            nested, name = match.groups()
            parent = parent if nested else name
            path = parent + name if nested else name
            found[path] = line[match.end() :]
        else:
            found[path] += " " + line.strip()
    return found


def files(*patterns: str) -> list[Path]:
    """Files of the repository, without what is built or hidden."""
    return [path for top in TOP for pattern in patterns for path in sorted((ROOT / top).rglob(pattern))]


def missing_paths(text: str) -> list[str]:
    """Paths of the repository in a text that do not exist."""
    return sorted({path for path in PATH.findall(text) if not (ROOT / path).exists()})


def test_the_tree_is_that_of_the_folders() -> None:
    tree = tree_of(DESIGN)
    assert [name for name in tree if not (ROOT / name).exists()] == []
    layers = {f"qguard_edge/{path.parent.name}/" for path in (ROOT / "qguard_edge").glob("*/__init__.py")}
    assert {name for name in tree if name.startswith("qguard_edge/") and name.endswith("/")} - {"qguard_edge/"} == layers
    assert {name.partition("/")[0] for name in tree} == set(TOP)


def test_the_tree_names_every_folder_of_scripts_and_every_document() -> None:
    tree = tree_of(DESIGN)
    scripts = {path.parent.name + "/" for path in (ROOT / "scripts").glob("*/*.py")}
    assert set(re.findall(r"\b\w+/", tree["scripts/"])) == scripts
    documents = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert set(re.findall(r"[\w-]+\.md", tree["docs/"])) == documents
    folders = {path.parent.name + "/" for path in (ROOT / "docs").glob("*/*.md")}
    assert set(re.findall(r"\b\w+/", tree["docs/"])) == folders | {"examples/"}


def test_the_layers_that_are_drawn_are_those_that_a_test_holds() -> None:
    (line,) = re.findall(r"^quant_grids <- .*$", DESIGN, re.MULTILINE)
    order = [group.split(", ") for group in line.split(" <- ")]
    place = {layer: rank for rank, group in enumerate(order) for layer in group}
    folders = {path.parent.name for path in (ROOT / "qguard_edge").glob("*/__init__.py")}
    assert set(place) == folders | {"quant_grids", "convert"}
    for layer in folders:
        for path in (ROOT / "qguard_edge" / layer).rglob("*.py"):
            imported = set(re.findall(r"^\s*(?:from|import) qguard_edge\.(\w+)", path.read_text(), re.MULTILINE))
            assert [name for name in imported & folders if place[name] > place[layer]] == [], path


@cache
def commands() -> dict[str, Any]:
    """Every command with its full name, such as `lab run`."""
    found: dict[str, Any] = {}
    waiting: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]
    while waiting:
        name, command = waiting.popitem()
        found[name] = command
        waiting |= {f"{name} {inner}": below for inner, below in getattr(command, "commands", {}).items()}
    return found


def test_the_readme_is_short_and_its_picture_is_that_of_the_result_files() -> None:
    assert len(README.splitlines()) < 150
    assert "](docs/first-picture.svg)" in README
    for name in RESULTS.values():
        for arm in arms_of(name).values():
            assert arm["asr"]["n"] == 160
    drawn = re.findall(r">([\d.]+%?)</text>", PICTURE.read_text())
    expected = [f"{value:.0%}" for row in shares() for value in row] + [
        f"{value:.3f}" for row in distances() for value in row
    ]
    assert [number for number in drawn if number.endswith("%") or len(number) == 5] == expected


def test_the_picture_of_the_real_model_is_drawn_from_the_results(tmp_path: Path) -> None:
    assert len({dot.defense for dot in dots()}) >= 5
    save(draw_real, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == REAL_PICTURE.read_text()


def test_every_command_stands_in_the_table_of_the_readme() -> None:
    table = README.partition("| command | what it does |\n|---|---|\n")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(name for name in commands() if " " not in name)


@pytest.mark.parametrize("name", NAMES)
def test_paths_in_documents_exist(name: str) -> None:
    assert missing_paths((ROOT / name).read_text()) == []


def test_scripts_are_named_where_they_are() -> None:
    named = re.compile(r"(?<![\w./-])scripts/[\w./-]*\w\.(?:py|sh)")
    others = [ROOT / name for name in ("Makefile", "action.yml", "pyproject.toml", ".ci/run")]
    found = {
        (str(path.relative_to(ROOT)), script)
        for path in (*files("*.py", "*.sh"), *others)
        if path != Path(__file__)
        for script in named.findall(path.read_text())
    }
    assert len(found) > 20
    assert sorted(place for place in found if not (ROOT / place[1]).exists()) == []


@pytest.mark.parametrize("name", NAMES)
def test_tests_in_documents_exist(name: str) -> None:
    for path, test in re.findall(r"`(tests/[\w./]+\.py)::(\w+)`", (ROOT / name).read_text()):
        assert f"\ndef {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


def test_a_missing_path_is_found() -> None:
    text = "`qguard_edge/pipeline.py`, scripts/study_scan.py, see convert/diff.py and https://x.org/docs/none.md"
    assert missing_paths(text) == ["qguard_edge/pipeline.py", "scripts/study_scan.py"]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    place = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", place.read_text()):
        if "://" in target:
            continue
        path, _, part = target.partition("#")
        aim = place.parent / path if path else place
        assert aim.exists(), target
        if part:
            headings = re.findall(r"^#+ (.+)$", aim.read_text(), re.MULTILINE)
            assert part in {anchor(heading) for heading in headings}, target


def calls(text: str) -> list[tuple[str, str]]:
    """`qguard-edge COMMAND ARGUMENTS` in a text, without comments: command and arguments."""
    known = sorted(commands(), key=len, reverse=True)
    found = []
    for rest in re.findall(r"qguard-edge ((?!- )[a-z][^`\n#]*)", text.replace("\\\n", " ")):
        command = next((name for name in known if re.match(rf"{name}\b", rest)), None)
        if command:
            found.append((command, rest.removeprefix(command)))
    return found


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


@pytest.mark.parametrize("name", NAMES)
def test_options_in_documents_exist(name: str) -> None:
    known = commands()
    for command, arguments in calls((ROOT / name).read_text()):
        given = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", arguments))
        assert given <= options_of(known[command]), f"qguard-edge {command}{arguments}"


def test_calls_are_found() -> None:
    text = "$ qguard-edge verify a.gguf --base b.gguf  # --not\n`qguard-edge lab run --to q4_0`, qguard-edge - a word"
    assert calls(text) == [("verify", " a.gguf --base b.gguf  "), ("lab run", " --to q4_0")]
    assert sum(len(calls(path.read_text())) for path in DOCUMENTS) > 50


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_in_documents_exist(name: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", (ROOT / name).read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TELLING_OF_BEFORE])
def test_old_words_are_gone(name: str) -> None:
    assert OLD_WORDS.findall((ROOT / name).read_text()) == []
