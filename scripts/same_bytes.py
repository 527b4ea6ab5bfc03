"""Do two versions of qguard-edge write the same bytes from the same model, options and seed?

Run: python scripts/same_bytes.py --old CHECKOUT --new CHECKOUT [--quick] [--work FOLDER] [--only TEXT]

For each case it runs the command line of both checkouts (`python -m qguard_edge` with PYTHONPATH=CHECKOUT, seed 7, one
thread, CPU) on the same files and compares what comes out: of a GGUF the tensor data, each tensor's place, type and
shape, and all metadata but `qguard.*`; of a folder every file but README.md and qguard.json. What those say is listed
where it differs. The models, a tiny random Llama and SmolLM2-135M, are made once by the old checkout. `--quick` leaves
SmolLM2 out.

The old checkout's outputs and their hashes are kept in the work folder and used again as long as its commit, the command,
the input files and the installed libraries are the same. The last line of output is one JSON object, with all the parts
that were not judged and in how many cases they differ. Exit code 1 if anything differs or a command fails.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from output_hashes import Difference, Parts, compare_parts, overall_hash, parts_of
from rich.console import Console
from rich.table import Table
from same_bytes_cases import COMMON, FAST, Case, smollm2_cases, tiny_cases

SHOWN = 12  # hex digits of a hash in the table
LIBRARIES = ("llama-cpp-python", "torch", "transformers", "bitsandbytes", "safetensors", "gguf", "numpy")
TEXT = "\n\n".join(
    [
        "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 3,
        "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\nfor i in range(10):\n    print(i, add(i, i))\n",
        "What is the capital of France? Paris. What is two and two? Four. 1234567890 !?.,;:()[]{}",
        "A quantized model keeps fewer bits for each weight, so it is smaller and it is a little less exact. " * 2,
    ]
)
MAKE_TINY = "import sys, pathlib, conftest; conftest.make_tiny_folder(pathlib.Path(sys.argv[1]))"
MAKE_SMOLLM2 = """
import pathlib, sys
try:
    from qguard_edge.lab.smollm2 import make_folder
except ImportError:
    from smollm2 import make_folder
make_folder(pathlib.Path(sys.argv[1]))
"""


RENAMED = {"out.reference.gguf": "out.plain.gguf"}
"""Outputs that newer versions name otherwise."""


def _made(folder: Path, name: str) -> Path:
    """An output, by its old name or its new one."""
    path = folder / name
    return path if path.exists() or name not in RENAMED else folder / RENAMED[name]


@dataclass(frozen=True)
class Result:
    """What one checkout made of a case: the parts of each output, or the error it ended with; wall time in seconds."""

    outputs: Mapping[str, Parts]
    error: str
    seconds: float


class Checkout:
    """One version of the program, and the folder its outputs go to."""

    def __init__(self, root: Path, work: Path) -> None:
        self.root, self.work = root.resolve(), work
        where = self.python(["-c", "import qguard_edge; print(qguard_edge.__file__)"], cwd=Path(tempfile.gettempdir()))
        if not Path(where.strip()).is_relative_to(self.root):
            raise SystemExit(f"{root} has no package qguard_edge; Python finds {where.strip() or 'none'}")
        self.version = self._version()

    def _version(self) -> str:
        """The commit; empty if files differ from it, for then nobody knows what ran."""
        command = ["git", "-C", str(self.root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return "" if found.endswith("-dirty") else found

    def python(self, arguments: Sequence[str], cwd: Path, more: Sequence[str] = ()) -> str:
        """Run Python with this checkout's packages, and the modules of `more` folders of it; returns standard output.

        Raises:
            subprocess.CalledProcessError: the exit code is not 0.
        """
        paths = [self.root, *(self.root / name for name in more)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "XDG_CACHE_HOME": str(cwd / "cache"),  # or text that one version wrote would be read by the other
            "HF_HUB_OFFLINE": "1",
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        }
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout

    def cli(self, line: str, cwd: Path) -> str:
        """Run one command line of the program; see `python`."""
        return self.python(["-m", "qguard_edge", *shlex.split(line)], cwd)

    def defenses(self) -> list[str]:
        """Names that `qguard-edge defenses` lists."""
        listed = json.loads(self.cli("defenses --json", Path(tempfile.gettempdir())))
        return [str(entry["name"]) for entry in listed["defenses"]]

    def run(self, case: Case, inputs: Path) -> Result:
        """Make the case's outputs anew and hash them."""
        folder = self.work / case.file_name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start = time.monotonic()
        try:
            for line in case.commands:
                self.cli(line.format(inputs=shlex.quote(str(inputs))), folder)
            outputs = {name: parts_of(_made(folder, name)) for name in case.outputs}
        except subprocess.CalledProcessError as error:
            last = [line for line in error.stderr.splitlines() if line.strip()][-1:]
            return Result({}, f"exit code {error.returncode}: {''.join(last)}", time.monotonic() - start)
        except FileNotFoundError as error:
            return Result({}, f"no output: {error}", time.monotonic() - start)
        return Result(outputs, "", time.monotonic() - start)


def make_inputs(old: Checkout, inputs: Path, smollm2: bool) -> None:
    """Make what is not there yet, each at once or not at all."""
    inputs.mkdir(parents=True, exist_ok=True)
    (inputs / "text.txt").write_text(TEXT, encoding="utf-8")
    for name, code in (("tiny", MAKE_TINY), ("smollm2", MAKE_SMOLLM2)):
        if (smollm2 or name == "tiny") and not (inputs / name).exists():
            with tempfile.TemporaryDirectory(dir=inputs) as temporary:
                made = Path(temporary) / name
                old.python(["-c", code, str(made)], Path(temporary), ("tests", "scripts"))
                made.rename(inputs / name)
    if not (inputs / "tiny.gguf").exists():
        old.cli(f"convert tiny --to bf16 -o tiny.gguf {COMMON} {FAST}", inputs)
    if not (inputs / "tiny.imatrix.gguf").exists():
        old.cli("imatrix tiny --text text.txt -o tiny.imatrix.gguf --chunk-size 32 --device cpu", inputs)


def input_hash(inputs: Path, smollm2: bool) -> str:
    """One hash of the inputs' files, of all that cases with or without SmolLM2 read."""
    names = ["tiny", "tiny.gguf", "tiny.imatrix.gguf", "text.txt", *(["smollm2"] if smollm2 else [])]
    parts = {name: overall_hash(parts_of(inputs / name)) for name in names}
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def remembered(old: Checkout, case: Case, inputs: Path, input_id: str) -> Result:
    """The old checkout's result, from the work folder if it is of the same commit, commands, inputs and libraries."""
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    key = {"commit": old.version, "commands": list(case.commands), "inputs": input_id, "libraries": libraries}
    path = old.work / f"{case.file_name}.json"
    if old.version and path.is_file():
        known = json.loads(path.read_text())
        if known["key"] == key:
            return Result(known["outputs"], "", 0.0)
    result = old.run(case, inputs)
    if not result.error:
        path.write_text(json.dumps({"key": key, "outputs": result.outputs}))
    return result


def compare_results(old: Result, new: Result) -> Difference:
    """What differs over all outputs of a case; a part is named with its file if there are several."""
    if old.error or new.error:
        return Difference(tuple(f"{who}: {r.error}" for who, r in (("old", old), ("new", new)) if r.error), ())
    parts: list[str] = []
    noted: list[str] = []
    for name, made in old.outputs.items():
        found = compare_parts(made, new.outputs[name])
        label = f"{name}: " if len(old.outputs) > 1 else ""
        parts += [label + part for part in found.parts]
        noted += [label + part for part in found.noted]
    return Difference(tuple(parts), tuple(noted))


def _hashes(result: Result) -> str:
    return " ".join(overall_hash(parts)[:SHOWN] for parts in result.outputs.values()) or "failed"


def _in_words(difference: Difference, shown: int = 4) -> str:
    said = []
    for title, names in (("differ", difference.parts), ("noted", difference.noted)):
        rest = f" and {len(names) - shown} more" if len(names) > shown else ""
        if names:
            said.append(f"{title}: {', '.join(names[:shown])}{rest}")
    return "; ".join(said)


def main() -> int:
    """Run every case on both; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--new", type=Path, required=True, help="checkout to judge")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "same_bytes", help="models and outputs")
    parser.add_argument("--quick", action="store_true", help="leave SmolLM2 out")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name has this in it")
    arguments = parser.parse_args()
    work, console = arguments.work.resolve(), Console(width=150)
    old, new = Checkout(arguments.old, work / "old"), Checkout(arguments.new, work / "new")
    cases = tiny_cases(old.defenses()) + ([] if arguments.quick else smollm2_cases())
    cases = [case for case in cases if arguments.only in case.name]
    if not cases:
        parser.error(f"--only {arguments.only!r}: no case has this in its name")
    smollm2 = any(case.name.startswith("smollm2") for case in cases)
    make_inputs(old, work / "inputs", smollm2)
    ids = {name: input_hash(work / "inputs", name) for name in ({False, True} if smollm2 else {False})}
    table = Table(title=f"old {old.version[:SHOWN] or 'changed'}, new {new.version[:SHOWN] or 'changed'}")
    for name in ("case", "old", "new", "same?", "what differs"):
        table.add_column(name, overflow="fold")
    bad = []
    noted: Counter[str] = Counter()
    for case in cases:
        before = remembered(old, case, work / "inputs", ids[case.name.startswith("smollm2")])
        after = new.run(case, work / "inputs")
        found = compare_results(before, after)
        bad += [] if found.same else [case.name]
        noted.update(found.noted)
        table.add_row(case.name, _hashes(before), _hashes(after), "yes" if found.same else "NO", _in_words(found))
        print(
            f"{case.name}: {'same' if found.same else 'DIFFERS'}, {before.seconds:.0f} + {after.seconds:.0f} s", flush=True
        )
    console.print(table)
    print(json.dumps({"cases": len(cases), "differ": bad, "noted": noted}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
