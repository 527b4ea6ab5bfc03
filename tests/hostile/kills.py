"""Stop commands at random moments and look at what is left: `python -m tests.hostile.kills --seed 1 --cases 100`.

Each command first runs to its end: how long it takes, when it takes the name of its output, and what it writes. Then it is
started anew and gets SIGKILL at a random moment between these two, counted from when it takes the name this time, and longer
if that took longer. A case holds if nothing partial has a final name (what is there is whole, and what the undisturbed run
wrote), if every process of the run is gone, and if the same command again succeeds, writes the same bytes and leaves nothing
but its output, neither beside it nor in the system's temporary folder. Runs that were over before the signal came are counted
apart, and so are kills that left something unfinished for the next run to sweep. With `--state FILE` an interrupted series
goes on.

The campaign `kill` of `make fuzz` does the same with any of four signals, at moments that are not measured first.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.hostile.material import Material, digests, made_apart

SECONDS = 600  # for a command that nobody stops, on a busy machine
LINGER = 5.0  # for children to notice that their parent is gone
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HELD, SWEPT, LATE = KINDS = "held", "held and swept", "ended before"
DATED = ("verify.json", "report.html")
TORCHS = "torchinductor"  # a folder that torch keeps on purpose


def commands(sound: Material, out: Path) -> dict[str, list[str]]:
    """The commands that get killed, by name; each writes `out` and takes some seconds."""
    text = ["--calib", str(sound.text)]
    made = ["--seed", "1", "--threads", "1", "--no-scan", "-o", str(out)]
    plan = ["plan", str(sound.base), "--base", str(sound.base), "--plain", str(sound.plain)]
    asked = ["--suites", "drift", "--suite", str(sound.suite), "--text", str(sound.text), "--threads", "1", "-o", str(out)]
    return {
        "convert, feedback": ["convert", str(sound.base), "--to", "q4_k", *text, *made],
        "convert, ortho": ["convert", str(sound.base), "--to", "q4_k", "--defense", "ortho", *made],
        "convert, folder to GGUF": ["convert", str(sound.model), "--to", "q4_k", *text, *made],
        "convert, folder to NF4": ["convert", str(sound.model), "--to", "nf4", "--defense", "ortho", *made],
        "verify": ["verify", str(sound.plain), "--base", str(sound.base), *asked],
        "verify, base in a folder": ["verify", str(sound.plain), "--base", str(sound.model), *asked],
        "plan": [*plan, "--defense", "ortho", *made],
        "apply": ["apply", str(sound.plan), "--plain", str(sound.plain), "-o", str(out)],
    }


@dataclass(frozen=True)
class Whole:
    """An undisturbed run.

    Attributes:
        begins: seconds from its start until it holds the name of its output.
        seconds: until its end.
        written: SHA-256 of what it wrote, by path within the folder of the output.
    """

    begins: float
    seconds: float
    written: Mapping[str, str]


def start(command: Sequence[str], scratch: Path) -> "subprocess.Popen[str]":
    """A command as a process of its own, with a temporary folder of its own."""
    line = [sys.executable, "-m", "qguard_edge", *command, "--json"]
    environment = os.environ | {"TMPDIR": str(scratch), "QGUARD_OFFLINE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=environment)


def written(here: Path) -> dict[str, str]:
    """SHA-256 of everything in a folder, hidden names included."""
    return {str(Path(path).relative_to(here)): digest for path, digest in digests(here).items()}


def leftovers(here: Path, scratch: Path, out: str) -> list[str]:
    """What is there and is not the output."""
    foreign = [path.name for path in here.iterdir() if path.name != out]
    hidden = [path.name for path in (here / out).rglob(".*")] if (here / out).is_dir() else []
    temporary = [f"TMPDIR/{path.name}" for path in scratch.iterdir() if not path.name.startswith(TORCHS)]
    return sorted([*foreign, *hidden, *temporary])


def undisturbed(name: str, sound: Material, place: Path) -> Whole:
    """Run a command to its end."""
    here, scratch = folders(place)
    began = time.monotonic()
    child = start(commands(sound, here / "o")[name], scratch)
    begins = time_of_name(child, here)
    _, err = child.communicate(timeout=SECONDS)
    seconds = time.monotonic() - began
    left = leftovers(here, scratch, "o")
    if child.returncode not in (0, 1, 3) or left:
        raise RuntimeError(f"{name} by itself ended with {child.returncode} and left {left}: {err[-300:]}")
    return Whole(begins, seconds, written(here))


def time_of_name(child: "subprocess.Popen[str]", here: Path) -> float:
    """Wait until a command that has just been started takes the name of its output, or ends; seconds."""
    began = time.monotonic()
    while child.poll() is None and time.monotonic() < began + SECONDS and not any(here.iterdir()):
        time.sleep(0.002)
    return time.monotonic() - began


def folders(place: Path) -> tuple[Path, Path]:
    """An empty folder for the output, and one for what is temporary."""
    here, scratch = place / "case", place / "scratch"
    here.mkdir()
    scratch.mkdir()
    return here, scratch


def living(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == session:
                found.append(process.pid)
    return found


def named(here: Path) -> dict[str, str]:
    """SHA-256 of what has its final name."""
    return {name: digest for name, digest in written(here).items() if not any(part[0] == "." for part in Path(name).parts)}


def broken_reports(here: Path) -> list[str]:
    """Reports that end before their end: they hold times, so that no two runs write the same."""
    reports = [here / "o" / name for name in DATED]
    return [path.name for path in reports if path.exists() and not path.read_text().rstrip().endswith(("}", "</html>"))]


def stopped(
    name: str, number: signal.Signals, moment: float, sound: Material, place: Path, whole: Whole | None = None
) -> str:
    """Stop a command, then let it run again.

    Args:
        name: of the command.
        number: the signal.
        moment: seconds after the start; with `whole` a share of the time from taking the output's name to the end.
        sound: inputs.
        place: an empty folder.
        whole: what the command does when nobody stops it, if that was measured.

    Returns:
        `HELD`, `SWEPT`, `LATE`, or the fault.
    """
    here, scratch = folders(place)
    command = commands(sound, here / "o")[name]
    child = start(command, scratch)
    if whole is not None:
        begins = time_of_name(child, here)
        moment *= (whole.seconds - whole.begins) * begins / whole.begins
    try:
        child.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        child.send_signal(number)
    _, err = child.communicate(timeout=SECONDS)
    late = child.returncode in (0, 1, 3)
    # Before the command begins, the system's own answer to a signal stands: it ends the process.
    if not late and child.returncode not in (128 + number, -number):
        return f"{number.name} after {moment:.2f} s: exit code {child.returncode}: {err[-300:]}"
    ends = time.monotonic() + LINGER
    while (alive := living(child.pid)) and time.monotonic() < ends:
        time.sleep(0.05)
    if alive:
        return f"{number.name} after {moment:.2f} s: {len(alive)} processes outlive the command"
    after = f"{number.name} after {moment:.2f} s"
    unfinished = [path for folder in (here, here / "o" / "work", scratch) for path in folder.glob(".qguard-*.[tw]*")]
    first = named(here)
    if broken := broken_reports(here):
        return f"{after}: partial under a final name: {broken}"
    again = start([*command, "--overwrite"] if (here / "o").exists() else command, scratch)
    _, err = again.communicate(timeout=SECONDS)
    if again.returncode not in ((0, 1, 3) if name.startswith("verify") else (0,)):
        return f"{after}: the next run ended with {again.returncode}: {err[-300:]}"
    if left := leftovers(here, scratch, "o"):
        return f"{after}: left behind: {left}"
    # The commands have a seed: what the first run had finished, the second one has written again, byte for byte, or kept.
    second = named(here)
    if other := [path for path, digest in first.items() if Path(path).name not in DATED and second.get(path) != digest]:
        return f"{after}: partial under a final name: {other}"
    if whole is not None and not name.startswith("verify") and second != whole.written:
        return f"{after}: the next run wrote other bytes"
    return LATE if late else SWEPT if unfinished else HELD


def table(names: Sequence[str], counts: Counter[str], wholes: Mapping[str, Whole]) -> str:
    """Markdown."""
    head = (
        "| command | undisturbed, s | SIGKILLs | held | of these, something unfinished was swept | failed | ended before |"
    )
    rows = [head, "|---|" + "---:|" * 6]
    for title, group in (*((name, [name]) for name in names), ("all", names)):
        held, swept, failed, late = (
            sum(counts[f"{name}/{kind}"] for name in group) for kind in (HELD, SWEPT, "failed", LATE)
        )
        seconds = sum(wholes[name].seconds for name in group)
        rows.append(f"| {title} | {seconds:.1f} | {held + swept + failed} | {held + swept} | {swept} | {failed} | {late} |")
    return "\n".join(rows)


def main() -> int:
    """Entry point; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=100, help="SIGKILLs that meet a running command, over all of them")
    parser.add_argument("--state", type=Path, help="go on from here, and keep it")
    options = parser.parse_args()
    counts, number = Counter[str](), 0
    if options.state and options.state.is_file():
        kept = json.loads(options.state.read_text())
        counts, number = Counter(kept["counts"]), kept["number"]
    with tempfile.TemporaryDirectory() as folder:
        sound = made_apart(Path(folder))
        names = list(commands(sound, Path()))
        wholes = {}
        for name in names:
            with tempfile.TemporaryDirectory() as place:
                wholes[name] = undisturbed(name, sound, Path(place))
        while sum(count for name, count in counts.items() if not name.endswith(LATE)) < options.cases:
            rng, name = random.Random(f"{options.seed}/{number}"), names[number % len(names)]
            whole = wholes[name]
            with tempfile.TemporaryDirectory() as place:
                found = stopped(name, signal.SIGKILL, rng.random(), sound, Path(place), whole)
            counts[f"{name}/{found if found in KINDS else 'failed'}"] += 1
            if found not in KINDS:
                sys.stdout.write(f"{number}, {name}: {found}\n")
                sys.stdout.flush()
            number += 1
            if options.state:
                options.state.parent.mkdir(parents=True, exist_ok=True)
                options.state.write_text(json.dumps({"counts": counts, "number": number}))
    sys.stdout.write(table(names, counts, wholes) + "\n")
    return 1 if any(name.endswith("failed") for name in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
