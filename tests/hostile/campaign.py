"""Run hostile cases against the commands and count what held: `python -m tests.hostile.campaign --minutes 60 --seed 1`.

A case is decided by the seed, the campaign's name and its number, so `--only NAME:NUMBER` repeats one. Each command runs in a
forked process with a limit on time. It holds if it ends by itself with an exit code of 0 to 3 and a JSON document, says neither
"internal error" nor a traceback, and leaves every file that was there as it was, and nothing half-finished beside them. `kill`
stops a command at a random moment and lets the next one clean up. With `--state FILE` an interrupted campaign goes on.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import psutil

from qguard_edge.cli import run
from qguard_edge.packs import transport
from qguard_edge.verify.suites.base import SuitePrompt
from quant_grids.errors import QGuardError
from tests.hostile import kills
from tests.hostile.bounds import DISK, mounts_of_its_own, unmounted, with_conditions
from tests.hostile.cases import CAMPAIGNS
from tests.hostile.material import Material, digests, made_apart

SECONDS = 150  # of waiting, or of the processor: on a busy machine a command may take longer. A template may take 120
CODES = (0, 1, 2, 3)
FAILED = 2
OUTPUTS = ("-o", "--report", "--html", "--sarif", "--junit", "--plot")
KILL = "kill"
PRELOADED = (
    "conversion.run",
    "scan.run",
    "verify.verifier",
    "packs.check",
    "compare.defenses",
    "report.html",
    "report.sarif",
)
"""Modules of the program that commands import when they run: loaded once here, and not in every forked process."""


def in_process(command: list[str], out: Path, err: Path) -> int:
    """In the forked process: the command, with its streams in files."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    transport.Connection.__init__.__defaults__ = (1.0,)
    command = with_conditions(command)
    if command[0] == "template":
        chat = import_module("qguard_edge.verify.chat")
        try:
            chat.render(chat.ChatTemplate(command[1], "<s>", "</s>"), [SuitePrompt("a", "hi")])
        except QGuardError as error:
            sys.stdout.write(json.dumps({"error": str(error)}))
            return 2
        sys.stdout.write("{}")
        return 0
    return run([*command, "--json"])


def forked(command: list[str], here: Path) -> tuple[int, str, str]:
    """Exit code (-1: it had to be stopped), standard output and error of a command."""
    out, err = here.parent / "stdout", here.parent / "stderr"
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setsid()
            code = in_process(command, out, err)
        finally:
            sys.stdout.flush()
            os._exit(code)
    looked, waited, spent = time.monotonic(), 0.0, 0.0
    while max(waited, spent) < SECONDS:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), out.read_text(errors="replace"), err.read_text(errors="replace")
        time.sleep(0.005)
        if time.monotonic() > looked + 1:
            works, spent = activity(child)
            waited += 0 if works else time.monotonic() - looked
            looked = time.monotonic()
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1, "", f"stopped after {waited:.0f} s of waiting and {spent:.0f} s of work"


def activity(process: int) -> tuple[bool, float]:
    """Whether a process or a child of it works (or would, had it a core), and the processor seconds of all of them."""
    works, spent = False, 0.0
    with suppress(psutil.Error):
        for one in (main := psutil.Process(process), *main.children(recursive=True)):
            with suppress(psutil.Error):
                works |= one.status() == psutil.STATUS_RUNNING
                spent += sum(one.cpu_times()[:4])
    return works, spent


def replaceable(command: list[str], code: int) -> Callable[[str], bool]:
    """Which files a command may have replaced: with `--overwrite`, if it did what it was asked, all but its inputs."""
    may = "--overwrite" in command and code != FAILED
    inputs = {str(Path(word).resolve()) for option, word in pairwise(command) if option not in OUTPUTS and "\0" not in word}
    return lambda path: may and str(Path(path).resolve()) not in inputs


def fault_of(command: list[str], here: Path) -> tuple[int, str]:
    """The exit code of a command, and what is wrong with how it ended; empty if nothing is."""
    before = digests(here)
    code, out, err = forked(command, here)
    after = digests(here)
    if code not in CODES:
        return code, f"exit code {code}: {err[-300:]}"
    for words in ("internal error", "Traceback"):
        if words in err or words in out:
            return code, err[-500:]
    try:
        json.loads(out)
    except ValueError:
        return code, f"no JSON document: {out[:200]!r}"
    may = replaceable(command, code)
    lost = [path for path, digest in before.items() if after.get(path) != digest and not may(path)]
    left = [path for path in after if "/.qguard-" in path]
    return code, f"changed: {lost}" if lost else f"left behind: {left}" if left else ""


def case(name: str, seed: int, number: int, sound: Material, codes: Counter[str]) -> str:
    """One case: its first fault, or nothing. Counts how its commands ended in `codes`."""
    rng = random.Random(f"{seed}/{name}/{number}")
    with tempfile.TemporaryDirectory() as place:
        if name == KILL:
            killed = rng.choice(list(kills.commands(sound, Path())))
            found = kills.stopped(killed, rng.choice(kills.SIGNALS), rng.uniform(0.3, 8), sound, Path(place))
            return "" if found in kills.KINDS else f"{killed}: {found}"
        here = Path(place) / "case"
        here.mkdir()
        with unmounted(here / DISK):
            for command in CAMPAIGNS[name](rng, sound, here):
                code, fault = fault_of(command, here)
                codes[f"{name}/{code}"] += 1
                if fault:
                    return f"{' '.join(command)[:300]}: {fault}"
    return ""


@dataclass
class Counts:
    """What was tried so far.

    Attributes:
        cases: by campaign.
        failed: of these.
        codes: commands that ended with a code, by campaign and code; those of `kill` are not counted.
        seconds: that it took.
    """

    cases: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @classmethod
    def read(cls, path: Path) -> "Counts":
        """Those that `write` has written."""
        kept = json.loads(path.read_text())
        return cls(Counter(kept["cases"]), Counter(kept["failed"]), Counter(kept["codes"]), kept["seconds"])

    def write(self, path: Path) -> None:
        """Keep them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(vars(self)))

    def table(self) -> str:
        """Markdown."""
        head = "| campaign | cases | held | failed | commands that ended with 0 | 1 | 2 | 3 |"
        rows = [self._row(name, [name]) for name in sorted(self.cases)]
        return "\n".join([head, "|---|" + "---:|" * 7, *rows, self._row("all", list(self.cases))])

    def _row(self, title: str, names: list[str]) -> str:
        cases, failed = (sum(counts[name] for name in names) for counts in (self.cases, self.failed))
        ended = [sum(self.codes[f"{name}/{code}"] for name in names) for code in CODES]
        return f"| {' | '.join(map(str, (title, cases, cases - failed, failed, *ended)))} |"


def main() -> int:
    """Entry point; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, help="go on from here, and keep it")
    parser.add_argument("--rounds", type=int, default=0, help="stop after so many rounds of all campaigns")
    parser.add_argument("--each", type=int, default=9, help="cases of a campaign at a time; of kill always one")
    parser.add_argument("--only", help="one campaign (NAME), or one case (NAME:NUMBER)")
    options = parser.parse_args()
    name, _, number = (options.only or "").partition(":")
    names = [name] if name else [*CAMPAIGNS, KILL]
    counts = Counts.read(options.state) if options.state and options.state.is_file() else Counts()
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # no threads to lose
    mounts_of_its_own()
    with tempfile.TemporaryDirectory() as place:
        sound = made_apart(Path(place))
        for module in PRELOADED:
            import_module(f"qguard_edge.{module}")
        begins = time.monotonic() - counts.seconds
        turn = 0
        while counts.seconds < 60 * options.minutes and turn < (1 if number else len(names) * options.rounds or turn + 1):
            campaign = names[turn % len(names)]
            for _ in range(1 if campaign == KILL or number else options.each):
                index = int(number) if number else counts.cases[campaign]
                fault = case(campaign, options.seed, index, sound, counts.codes)
                counts.cases[campaign] += 1
                if fault:
                    counts.failed[campaign] += 1
                    sys.stdout.write(f"{campaign}:{index}: {fault}\n")
                    sys.stdout.flush()
            turn += 1
            counts.seconds = time.monotonic() - begins
            if options.state:
                counts.write(options.state)
    sys.stdout.write(f"{counts.table()}\n\n{counts.seconds / 60:.0f} minutes\n")
    return 1 if counts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
