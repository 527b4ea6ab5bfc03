"""The model card of a GGUF; of a pair with a vision half in `test_parts`."""

import json
import shutil
from pathlib import Path

from huggingface_hub.repocard import metadata_load

from convert.hashes import sha256_of
from tests.helpers.command import CommandLine

QUICK = ("--defense", "ortho", "--seed", "3", "--threads", "1", "--no-scan", "--no-load-check", "--json")


def test_a_card_names_every_file_and_keeps_the_license(tiny_folder: Path, cli: CommandLine, tmp_path: Path) -> None:
    folder, card = shutil.copytree(tiny_folder, tmp_path / "Model"), tmp_path / "README.md"
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [mine]\n---\n# Model\n")
    out = tmp_path / "out.gguf"
    done = cli("convert", folder, "--to", "q4_k", *QUICK, "--keep-plain", "--card", card, "-o", out)
    assert done.returncode == 0, done.stderr
    said, text = json.loads(done.stdout), card.read_text()
    kept = metadata_load(card)
    assert kept is not None
    assert kept["license"] == "apache-2.0"
    assert kept["tags"] == ["gguf", "qguard-edge", "quantized"]
    row = f"| `out.gguf` | model | Q4_K_M | 100.0% of the rounded weights, `ortho` | `{sha256_of([out])}` |"
    assert row in text
    assert (
        f"| `out.plain.gguf` | llama.cpp's own rounding, for `qguard-edge diff` | Q4_K_M | no | `{said['sha256']['plain']}` |"
        in text
    )
    assert said["sha256"]["base"] in text
    assert "llama-cli -m out.gguf" in text
    assert "rule `ortho`, seed 3" in text
    assert str(tmp_path) not in text
    again = cli("convert", folder, "--to", "q4_k", *QUICK, "--card", card, "-o", tmp_path / "other.gguf")
    assert again.returncode == 2
    assert "README.md exists" in again.stderr
    assert not (tmp_path / "other.gguf").exists()


def test_shards_and_full_precision(tiny_base: Path, cli: CommandLine, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    done = cli(
        "convert",
        tiny_base,
        "--to",
        "q4_0",
        *QUICK,
        "--split-max-tensors",
        "12",
        "--card",
        card,
        "-o",
        tmp_path / "cut.gguf",
    )
    assert done.returncode == 0, done.stderr
    assert (
        f"# cut\n\n| file | what | type | protected | SHA-256 |\n|---|---|---|---|---|\n| `{json.loads(done.stdout)['outfile']}`"
        in card.read_text()
    )
    assert "shards; the hash is of all, one after the other)" in card.read_text()
    done = cli("convert", tiny_base, "--to", "f16", *QUICK[2:], "--card", card, "--overwrite", "-o", tmp_path / "full.gguf")
    assert done.returncode == 0, done.stderr
    assert "| nothing is rounded |" in card.read_text()
    refused = cli(
        "convert",
        tiny_base,
        "--to",
        "gguf",
        "--target",
        "q4_0",
        "--card",
        card,
        "--overwrite",
        "-o",
        tmp_path / "moved.gguf",
    )
    assert refused.returncode == 2
    assert "--card does not go with --to gguf" in refused.stderr
