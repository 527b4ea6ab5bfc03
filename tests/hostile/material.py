"""What the campaigns mutate, made once: a tiny model as folder, base and plain GGUF, a plan, a baseline pack, a suite."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from qguard_edge.cli import run
from tests.helpers.tiny_llama import make_tiny_folder

SUITE = """name: mine
title: Mine
new_tokens: 4
matchers:
  - {type: phrases, phrases: [fox]}
prompts:
  - {id: a, text: "The quick brown fox"}
  - {id: b, text: "What is the capital of France?"}
"""


@dataclass(frozen=True)
class Material:
    """Paths of sound files."""

    model: Path
    base: Path
    plain: Path
    plan: Path
    pack: Path
    suite: Path
    text: Path

    @classmethod
    def at(cls, model: Path, folder: Path) -> "Material":
        """What `make` has made."""
        names = ("base.gguf", "plain.gguf", "plan.safetensors", "pack.json", "s.yaml", "t.txt")
        return cls(model, *(folder / name for name in names))

    @classmethod
    def make(cls, model: Path, folder: Path) -> "Material":
        """Make everything from a model folder."""
        found = cls.at(model, folder)
        found.suite.write_text(SUITE)
        found.text.write_text("The quick brown fox jumps over the lazy dog.\n\nWhat is the capital of France? Paris.\n")
        quick = ["--threads", "1", "-q"]
        made = ["--no-scan", "--no-load-check", *quick]
        plan = ["--base", found.base, "--plain", found.plain, "-o", found.plan, "--defense", "ortho", "--no-scan", *quick]
        for command in (
            ["convert", model, "--to", "bf16", "-o", found.base, *made],
            ["convert", found.base, "--to", "q4_0", "--defense", "none", "-o", found.plain, *made],
            ["plan", found.base, *plan],
            ["baseline", found.base, "-o", found.pack, "--suites", "drift", "--text", found.text, "--limit", "2", *quick],
        ):
            if code := run([str(part) for part in command]):
                raise RuntimeError(f"{command[0]} ended with {code}: nothing to mutate")
        return found


def digests(folder: Path) -> dict[str, str]:
    """What regular files hold, links not followed, by path."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def made_apart(place: Path) -> Material:
    """The material, made in a forked process: threads that torch starts here would be missing in the forked commands."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            Material.make(make_tiny_folder(place / "tiny"), place)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the sound files could not be made")
    return Material.at(place / "tiny", place)
