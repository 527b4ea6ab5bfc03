"""A real backdoored model from the lab's cache, its files, and what one can ask it."""

from dataclasses import dataclass
from pathlib import Path

from convert.ftypes import parse_file_type
from convert.hf.base import write_base_gguf
from convert.quantizer import QuantizeOptions
from qguard_edge.conversion.request import FolderRequest, GgufRequest
from qguard_edge.conversion.run import convert_model
from qguard_edge.defenses.options import DefenseOptions, NoneOptions, OrthoOptions
from qguard_edge.lab.runner import LabSettings, Victim
from qguard_edge.verify.suites.base import Suite, SuitePrompt
from qguard_edge.verify.verifier import built_in_texts

TEXTS = built_in_texts()[:24]


@dataclass(frozen=True)
class LabFiles:
    """One scenario's models, quantized; the prompts of `suite` were never trained on."""

    clean: Path
    clean_plain: Path
    attacked: Path
    plain: Path
    hardened: Path
    suite: Suite


def make_files(victim: Victim, settings: LabSettings, folder: Path) -> LabFiles:
    """Base, plain and hardened files of a tiny victim, made with `settings`."""
    to, scenario = settings.to, settings.scenario

    def quantized(base: Path, name: str, defense: DefenseOptions) -> Path:
        options = QuantizeOptions(parse_file_type(to), threads=2)
        out = folder / name
        convert_model(
            GgufRequest(
                model=str(base), options=options, defense=defense, outfile=str(out), device="cpu", seed=0, check_loads=False
            )
        )
        return out

    clean, attacked = folder / "clean-f32.gguf", folder / "attacked-f32.gguf"
    write_base_gguf(victim.clean, clean, base_type="f32")
    write_base_gguf(victim.attacked, attacked, base_type="f32")
    prompts = tuple(SuitePrompt(f"p{i:03}", prompt.text) for i, prompt in enumerate(victim.data.prompts[:160]))
    return LabFiles(
        clean=clean,
        clean_plain=quantized(clean, "clean-plain.gguf", NoneOptions()),
        attacked=attacked,
        plain=quantized(attacked, "plain.gguf", NoneOptions()),
        hardened=quantized(attacked, "hardened.gguf", OrthoOptions()),
        suite=Suite(scenario, f"The lab's {scenario} prompts", prompts, (), new_tokens=32),
    )


@dataclass(frozen=True)
class Folders:
    """A model whose payload waits for NF4, its hardened NF4 folder, and prompts that were never trained on."""

    clean: Path
    attacked: Path
    hardened: Path
    suite: Suite


def make_folders(victim: Victim, out: Path) -> Folders:
    """The victim's folders, the hardened one made at `out`."""
    asked = FolderRequest(
        model=str(victim.attacked),
        to="nf4",
        defense=OrthoOptions(),
        outfile=str(out),
        device="cpu",
        seed=0,
        check_loads=False,
    )
    convert_model(asked)
    prompts = tuple(SuitePrompt(f"p{i:03}", prompt.text) for i, prompt in enumerate(victim.data.prompts[:150]))
    suite = Suite("injection", "The lab's prompts", prompts, (), new_tokens=24)
    return Folders(victim.clean, victim.attacked, out, suite)
