"""Folders for bitsandbytes: how tests ask for one, and how they load it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from qguard_edge.conversion.request import FolderRequest
from qguard_edge.defenses.options import DefenseOptions, OrthoOptions
from qguard_edge.runtimes.bnb import exact_on_cpu


def folder_request(
    folder: Path,
    out: Path,
    to: str,
    defense: DefenseOptions = OrthoOptions(),  # noqa: B008
    **more: Any,
) -> FolderRequest:
    """On the processor, with a fixed seed, without the load check, which has a test of its own."""
    base = FolderRequest(str(folder), to, defense, outfile=str(out), device="cpu", seed=3, check_loads=False)
    return replace(base, **more)


def load(folder: Path, **more: Any) -> Any:
    """The model as a user loads it, its arithmetic exact on the processor."""
    return exact_on_cpu(AutoModelForCausalLM.from_pretrained(folder, **more).eval())
