"""The documentation as a site, without building it: every page has a place, every link leads somewhere, tables fit a screen."""

import json
import posixpath
import re
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from demo_text import COMMANDS, WIDTH, marks, page_with
from docs_pages import FROM_THE_ROOT, LINK, SCHEMAS, anchor, pages, relinked
from typer.main import get_command

import qguard_edge
from qguard_edge.cli import app
from qguard_edge.defenses.options import DEFENSE_OPTIONS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONFIGURATION = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
SCREEN = 40
"""Lines of text that a table may have: at 1366 x 900 these fill a screen."""
LINE = 90
"""Characters across a table."""
CODE = 88
"""Characters of a line of code that a desk shows; see docs/site.css."""
GUIDES = {"Tutorial", "How to", "Explanation"}


@cache
def site() -> dict[str, str]:
    """Every page by name: what is written in docs/, and what code writes."""
    written = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
    assert not written.keys() & pages().keys()
    return {name: relinked(text, name, None) for name, text in (written | pages()).items()}


def places(nav: list[Any]) -> list[str]:
    """Pages of a part of the navigation, in order."""
    found: list[str] = []
    for entry in nav:
        (below,) = entry.values()
        found += [below] if isinstance(below, str) else places(below)
    return found


def longest_table(text: str) -> int:
    """Lines of text that the longest table has on a desk, each row's padding counted as one."""
    runs = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    rows = [[LINK.sub(r"\2", row) for row in run.splitlines()[2:]] for run in runs]
    return max((sum(1 + -(-len(row) // LINE) for row in table) for table in rows), default=0)


def without_code(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)


def test_every_page_has_one_place_in_the_navigation() -> None:
    assert sorted(places(CONFIGURATION["nav"])) == sorted(site())


def test_every_link_of_the_site_leads_to_a_page_and_a_heading() -> None:
    checked = 0
    for name, text in site().items():
        for _, _, target in LINK.findall(without_code(text)):
            if "://" in target:
                continue
            path, _, part = target.partition("#")
            aim = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            assert aim in site() or (DOCS / aim).is_file(), f"{name}: {target}"
            if part:
                headings = re.findall(r"^#+ (.+)$", without_code(site()[aim]), re.MULTILINE)
                assert part in {anchor(heading) for heading in headings}, f"{name}: {target}"
            checked += 1
    assert checked > 80


def test_links_of_the_repository_become_links_of_the_site() -> None:
    text = "[a](docs/scan.md#findings) ![b](docs/x.svg) [c](SECURITY.md) [d](action.yml) [e](#here) [f](https://x.org/y)"
    plain = "[a](scan.md#findings) ![b](x.svg) [c](security.md) d [e](#here) [f](https://x.org/y)"
    assert relinked(text, "index.md", None) == plain
    linked = plain.replace(" d ", " [d](https://x.org/r/blob/main/action.yml) ")
    assert relinked(text, "index.md", "https://x.org/r") == linked
    assert relinked("[a](../../CHANGELOG.md) [b](../scan.md)", "howto/x.md", None) == "[a](../changelog.md) [b](../scan.md)"


@pytest.mark.parametrize("part", sorted(GUIDES))
def test_no_table_of_a_guide_is_longer_than_a_screen(part: str) -> None:
    (nav,) = [entry[part] for entry in CONFIGURATION["nav"] if part in entry]
    lines = {name: longest_table(site()[name]) for name in places(nav)}
    assert {name: count for name, count in lines.items() if count > SCREEN} == {}


@pytest.mark.parametrize("part", sorted(GUIDES | {"Start"}))
def test_no_line_of_code_of_a_guide_is_cut_off(part: str) -> None:
    (nav,) = [entry for entry in CONFIGURATION["nav"] if part in entry]
    for name in places([nav]):
        for block in re.findall(r"^```.*?^```$", site()[name], re.MULTILINE | re.DOTALL):
            assert max(len(line) for line in block.splitlines()) <= CODE, (name, block)


def test_long_tables_are_found() -> None:
    assert longest_table("| a |\n|---|\n| 1 |\n| 2 |\n\ntext\n\n| b |\n|---|\n| 1 |\n") == 4
    assert longest_table(f"| a |\n|---|\n| {'x' * LINE} |") == 3
    assert longest_table(site()["results.md"]) > SCREEN


def test_lists_stand_apart_from_the_paragraph_above() -> None:
    """Python's Markdown, unlike GitHub's, sees no list otherwise."""
    for name, text in site().items():
        lines = without_code(text).splitlines()
        for above, line in pairwise(lines):
            starts = re.match(r"([-*]|1\.) ", line)
            assert not starts or not above.strip() or re.match(r"[-*] |\d+\. | {2,}|#", above), f"{name}: {line}"


def test_the_commands_are_all_there_with_their_options() -> None:
    page = pages()["reference/commands.md"]
    waiting: list[tuple[str, Any]] = [("qguard-edge", get_command(app))]
    seen = 0
    while waiting:
        name, command = waiting.pop()
        inner = getattr(command, "commands", None)
        if inner is not None:
            waiting += [(f"{name} {word}", below) for word, below in inner.items()]
            continue
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            options = [option for option in parameter.opts if option.startswith("-")]
            assert parameter.hidden or all(f"`{option}`" in section for option in options), (name, parameter.opts)
            seen += 1
    assert seen > 200


def test_the_other_pages_that_code_writes_are_whole() -> None:
    written = pages()
    for name in DEFENSE_OPTIONS:
        assert f"\n## {name}\n" in written["reference/defenses.md"]
    for name in qguard_edge.__all__:
        assert name.startswith("__") or re.search(rf"^::: \S+\.{name}$", written["reference/api.md"], re.MULTILINE)
    for path in SCHEMAS.glob("*.json"):
        section = written["reference/documents.md"].partition(f"\n## {path.name}")[2].partition("\n## ")[0]
        assert all(f"`{field}`" in section for field in json.loads(path.read_text())["properties"])
    assert {written[name] for name in FROM_THE_ROOT} == {(ROOT / path).read_text() for path in FROM_THE_ROOT.values()}


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("backdoor", ("Zingaloo", "fail", "pass")),
        ("smollm2", ("Only code bits differ", "full precision than plain rounding", "verdict:        pass", "report.html")),
    ],
)
def test_the_text_of_the_demo_is_that_of_a_narrow_terminal(part: str, told: tuple[str, ...]) -> None:
    page = (DOCS / "demo.md").read_text()
    begin, end = marks(part)
    text = page.partition(begin)[2].partition(end)[0]
    assert f"$ {COMMANDS[part][0]}\n" in text
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    assert all(word in " ".join(text.split()) for word in (" ".join(words.split()) for words in told))
    inner = text.partition(f"$ {COMMANDS[part][0]}\n")[2].partition("\n```")[0]
    assert page_with(page, part, inner) == page


def test_a_long_line_is_folded_as_a_terminal_does() -> None:
    begin, end = marks("smollm2")
    page = page_with(f"a\n{begin}{end}b\n", "smollm2", f"{'x' * WIDTH}yy\n\nz\n")
    assert f"{'x' * WIDTH}\nyy\n\nz\n```" in page
    assert page.startswith("a\n")
    assert page.endswith("b\n")


def test_the_site_is_built_in_continuous_integration() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["docs"]["steps"] if "run" in step] == ["make docs"]
    assert "mkdocs build --strict" in (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {re.split("[>=]", wish)[0] for wish in extras["docs"]} == {"mkdocs", "mkdocs-material", "mkdocstrings-python"}
