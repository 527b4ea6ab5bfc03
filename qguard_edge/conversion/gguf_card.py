"""The model card of a GGUF: which files there are, what of them is protected, how they were made, and what that does not say."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import ModelCardData

from convert.gguf_file import GgufFile, GgufModel
from convert.hashes import sha256_of
from convert.missing import looks_like_hub_id
from qguard_edge import __version__
from qguard_edge.conversion.model_card import CARD_NAME, KEPT_KEYS, front_matter
from qguard_edge.conversion.report import GgufReport

_HALVES = ("vision", "audio")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def gguf_card(report: GgufReport, model: str) -> str:
    """The card, Markdown with the hub's front matter.

    Args:
        report: of the conversion; the files that it names are read.
        model: that was converted, as the user named it.
    """
    repo = model if looks_like_hub_id(model) and not Path(model).exists() else None
    folder = Path(model).expanduser()
    kept = front_matter(folder / CARD_NAME) if folder.is_dir() else {}
    data = ModelCardData(
        tags=["gguf", "qguard-edge", "quantized"] if report.defense else ["gguf", "qguard-edge"],
        base_model=repo,
        base_model_relation="quantized" if repo and report.defense else None,
        **{key: kept[key] for key in KEPT_KEYS if key in kept},
    )
    lines = ["---", data.to_yaml(), "---", "", f"# {_SHARD.sub('', report.outfile.stem)}", ""]
    lines += ["| file | what | type | protected | SHA-256 |", "|---|---|---|---|---|", *_files(report), ""]
    lines += [*_use(report), "", *_made(report), ""]
    if report.warnings:
        lines += ["The conversion warned:", "", *(f"    {_one_line(warning)}" for warning in report.warnings), ""]
    return "\n".join(lines)


def _files(report: GgufReport) -> Iterator[str]:
    """A row for each file."""
    shards = len(GgufModel(report.outfile).shards)
    cut = f" (first of {shards} shards; the hash is of all, one after the other)" if shards > 1 else ""
    what = "language model" if report.mmproj else "model"
    if report.coverage is None or report.defense is None:
        guarded = "nothing is rounded"
    else:
        guarded = f"{report.coverage.protected_share:.1%} of the rounded weights, `{report.defense.label}`"
    yield _row(report.outfile, f"{what}{cut}", report.file_type.name, guarded, report.hashes["output"])
    if report.mmproj:
        half = GgufFile(report.mmproj)
        kinds = [kind for kind in _HALVES if half.get(f"clip.has_{kind}_encoder")]
        text = f"{' and '.join(kinds) or 'other'} half (`--mmproj`)"
        yield _row(report.mmproj, text, _main_type(half), "no: as llama.cpp's converter wrote it", sha256_of([half.path]))
    if report.plain:
        text = f"llama.cpp's own rounding, for `qguard-edge diff`{cut}"
        yield _row(report.plain, text, report.file_type.name, "no", report.hashes["plain"])


def _row(path: Path, what: str, kind: str, guarded: str, digest: str) -> str:
    return f"| `{path.name}` | {what} | {kind} | {guarded} | `{digest}` |"


def _main_type(file: GgufFile) -> str:
    """The type of most weights."""
    weights: dict[str, int] = {}
    for tensor in file.tensors.values():
        weights[tensor.ggml_type.name] = weights.get(tensor.ggml_type.name, 0) + tensor.n_weights
    return max(weights, key=lambda name: weights[name])


def _use(report: GgufReport) -> list[str]:
    model = shlex.quote(report.outfile.name)
    with_half = f"llama-mtmd-cli -m {model} --mmproj {shlex.quote(report.mmproj.name)}" if report.mmproj else ""
    return ["```", with_half or f"llama-cli -m {model}", "```"]


def _made(report: GgufReport) -> list[str]:
    """How the file was made, how near it is to full precision, the verdict, and what none of that says."""
    if report.defense is None:
        return [f"Full precision, written by qguard-edge {__version__}; nothing is rounded."]
    lines = [
        f"The rounding was hardened by qguard-edge {__version__}, rule `{report.defense.label}`, seed {report.seed}, options "
        f"`{json.dumps(asdict(report.defense), sort_keys=True)}`: a measure against backdoors that wait for quantization. "
        f"Scales, types and layout are llama.cpp's own. SHA-256 of the base: `{report.hashes['base']}`.",
        "",
        "A behaviour that the full-precision model has is not changed by that."
        + (" The other half of the model is not protected." if report.mmproj else ""),
    ]
    if report.beside_plain:
        lines += ["", f"It is {report.beside_plain.sentence}."]
    if report.verification:
        lines += ["", f"Verdict of `qguard-edge verify`: {report.verification.verdict.value}.", ""]
        lines.append(f"    {_one_line(report.verification.summary)}")
    return lines


def _one_line(text: str) -> str:
    """For an indented block, in which nothing is Markdown; a line of it cannot be ended by foreign text."""
    return " ".join(text.split())
