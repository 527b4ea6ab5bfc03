"""Write docs/demo.md again: what `qguard-edge demo` prints, in 80 columns and without colour.

Run: python scripts/demo_text.py [--threads N]

The figures are those of the machine at hand; another processor may give other last digits. Ends with the command's exit code, and
writes nothing unless that is 0.
"""

import argparse
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "demo.md"
BEGIN, END = "<!-- demo -->\n", "<!-- end of demo -->\n"
WIDTH = 80


def shown(*arguments: str) -> tuple[int, str]:
    """Exit code and output of a command in a narrow terminal without colour (a pipe would get 140 columns)."""
    environment = os.environ | {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    terminal, inside = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "qguard_edge", *arguments], stdout=inside, env=environment, cwd=ROOT
    ) as child:
        os.close(inside)
        parts = list(_chunks(terminal))
    os.close(terminal)
    return child.returncode, b"".join(parts).decode().replace("\r\n", "\n")


def _chunks(terminal: int) -> Iterator[bytes]:
    """What is written to a terminal until nobody holds it any more: then Linux says EIO, others the end of the file."""
    with suppress(OSError):
        while chunk := os.read(terminal, 1 << 16):
            yield chunk


def page_with(page: str, text: str) -> str:
    """The page with another text between its marks."""
    before, _, rest = page.partition(BEGIN)
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return f"{before}{BEGIN}\n```text\n$ qguard-edge demo\n{lines}\n```\n\n{END}{rest.partition(END)[2]}"


def main() -> int:
    """Run the demo and write the page."""
    parser = argparse.ArgumentParser(description="Write docs/demo.md again.")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    code, text = shown("demo", "--threads", str(parser.parse_args().threads))
    if code == 0:
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
