"""Write docs/demo.md again: what `make demo` prints, in 80 columns and without colour.

Run: python scripts/demo_text.py [--threads N] [--only backdoor|smollm2]

The figures are those of the machine at hand; another processor may give other last digits. Ends with the command's exit code, and
writes nothing unless that is 0.
"""

import argparse
import os
import pty
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "demo.md"
WIDTH = 80
COMMANDS = {
    "backdoor": ("qguard-edge demo", ["-m", "qguard_edge", "demo"]),
    "smollm2": ("python scripts/demo.py --only smollm2", [str(ROOT / "scripts" / "demo.py"), "--only", "smollm2"]),
}
"""What stands between a pair of marks in the page: the command as it is shown, and Python's arguments for it."""


def marks(part: str) -> tuple[str, str]:
    """The lines of the page around a part."""
    return f"<!-- {part} -->\n", f"<!-- end of {part} -->\n"


def shown(arguments: list[str], threads: int) -> tuple[int, str]:
    """Exit code and output of Python with arguments, in a narrow terminal without colour (a pipe would get 140 columns)."""
    environment = os.environ | {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    environment |= {"QGUARD_THREADS": str(threads)}
    terminal, inside = pty.openpty()
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen([sys.executable, *arguments], stdout=inside, env=environment, cwd=folder) as child,
    ):
        os.close(inside)
        parts = list(_chunks(terminal))
    os.close(terminal)
    return child.returncode, b"".join(parts).decode().replace("\r\n", "\n")


def _chunks(terminal: int) -> Iterator[bytes]:
    """What is written to a terminal until nobody holds it any more: then Linux says EIO, others the end of the file."""
    with suppress(OSError):
        while chunk := os.read(terminal, 1 << 16):
            yield chunk


def page_with(page: str, part: str, text: str) -> str:
    """The page with another text between the marks of a part; lines are folded as a terminal folds them."""
    begin, end = marks(part)
    before, _, rest = page.partition(begin)
    lines = "\n".join(
        line[i : i + WIDTH].rstrip() for line in text.strip().splitlines() for i in range(0, max(len(line), 1), WIDTH)
    )
    return f"{before}{begin}\n```text\n$ {COMMANDS[part][0]}\n{lines}\n```\n\n{end}{rest.partition(end)[2]}"


def main() -> int:
    """Run the demo and write the page."""
    parser = argparse.ArgumentParser(description="Write docs/demo.md again.")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--only", choices=tuple(COMMANDS), help="one of the two parts")
    given = parser.parse_args()
    for part in [given.only] if given.only else COMMANDS:
        code, text = shown(COMMANDS[part][1], given.threads)
        if code:
            return code
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), part, text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
