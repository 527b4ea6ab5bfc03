"""A plan for a folder that brings its own Python code: refused, unless it is trusted."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.command import CommandLine, program

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_folder_runs_only_where_it_is_trusted(
    trusted: bool, tiny_folder: Path, tiny_base: Path, cli: CommandLine, tmp_path: Path
) -> None:
    folder, plain = tmp_path / "model", tmp_path / "plain.gguf"
    shutil.copytree(tiny_folder, folder)
    (folder / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": named}
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 20)
    assert cli("convert", tiny_base, "--to", "q4_0", "--defense", "none", "--quiet", "-o", plain).returncode == 0
    command = program(
        "plan", folder, "--base", tiny_base, "--plain", plain, "-o", tmp_path / "plan.safetensors", "--defense", "feedback",
        "--calib", tmp_path / "text.txt", "--calib-samples", "4", "--calib-seqlen", "32", "--seed", "1", "--threads", "1",
        "--no-scan", *(["--trust-remote-code"] if trusted else []),
    )  # fmt: skip
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if trusted else 2), done.stderr
    assert (tmp_path / "plan.safetensors").is_file() is trusted
    assert trusted or "cannot load" in done.stderr
