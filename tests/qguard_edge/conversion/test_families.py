"""The families of docs/architectures.md that the installed converter makes: the script that wrote the table, run again."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CLOSE = 1e-2
AT_LEAST = 20  # families that the built-in table lacks


def listed() -> set[str]:
    """What the document says to hold: the first of its two tables."""
    text = (ROOT / "docs" / "architectures.md").read_text()
    first, _, _ = text.partition("<!-- families: begin -->")[2].partition("| family | `architectures` | stops at |")
    return set(re.findall(r"^\| ([^|]+?) \| `[A-Z]\w+` \|", first, re.MULTILINE))


def test_enough_families_are_said_to_hold() -> None:
    assert len(listed()) >= AT_LEAST


@pytest.mark.slow
@pytest.mark.usefixtures("installed_converter")
@pytest.mark.timeout(3600)
def test_what_the_document_says_holds(tmp_path: Path) -> None:
    """Base, none, ortho and feedback at q4_k, load, decode, and the base's logits against transformers, for each of them."""
    script = ROOT / "scripts" / "studies" / "study_families.py"
    subprocess.run([sys.executable, script, "--work", tmp_path], check=True)
    rows = [json.loads(line) for line in (tmp_path / "families.jsonl").read_text().splitlines()]
    hold = {row["family"] for row in rows if "error" not in row and row["difference"] <= CLOSE}
    assert listed() - hold == set()
