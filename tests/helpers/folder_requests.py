"""Requests for folders of bitsandbytes, and how their results are loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from qguard_edge.conversion.opened_folder import OpenedFolder
from qguard_edge.conversion.outputs.folder import FolderOutput
from qguard_edge.conversion.request import FolderRequest
from qguard_edge.defenses.options import DefenseOptions, OrthoOptions
from qguard_edge.runtimes.bnb import exact_on_cpu


def request(folder: Path, out: Path, to: str, defense: DefenseOptions = OrthoOptions(), **more: Any) -> FolderRequest:  # noqa: B008
    base = FolderRequest(
        model=str(folder), to=to, defense=defense, outfile=str(out), device="cpu", seed=3, check_loads=False
    )
    return replace(base, **more)


def load(folder: Path, **more: Any) -> Any:
    return exact_on_cpu(AutoModelForCausalLM.from_pretrained(folder, **more).eval())


def opened(request: FolderRequest) -> OpenedFolder:
    """What the run does before it writes anything."""
    request.check()
    output = FolderOutput(request)
    output.open()
    return output.opened
