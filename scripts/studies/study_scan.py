"""How well does `scan` separate clean models from attacked ones? The tables and the ROC plot of docs/scan.md.

Run: python scripts/studies/study_scan.py --out docs/results/scan.json --plot docs/scan-roc.svg [--quick] [--deep N]

Clean models: the tiny model over seeds and training lengths, fine-tuned ones, one of them from a quantized model, a
random-weight model of every architecture, SmolLM2 as its package carries it (dequantized) and fine-tuned. Attacked models: the
lab's victims in `VICTIMS`, those that are in its cache, or all of them with `--train`. Every model is scanned as f32 and as
bf16. What was measured already is read from --out, so that a killed run goes on where it stopped.

With `--deep N` also the dose curve of N clean and of all attacked models. Prints Markdown; the last line is one JSON object.
"""

import argparse
import functools
import json
import sys
import tempfile
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from scan_models import Model, as_bf16, clean_models, victims
from scan_rows import Row, area, plot, roc_sets, tables

from convert.atomic import atomic_path
from convert.ftypes import parse_file_type
from convert.gguf_file import GgufFile, GgufModel
from convert.hf.base import write_base_gguf
from convert.quantizer import QuantizeOptions, quantize
from convert.source import resolve_source
from qguard_edge.lab import cache
from qguard_edge.progress import NoProgress
from qguard_edge.scan.dose import dose_curve
from qguard_edge.scan.positions import BINS, CLOSED_FORM, closed_form, histogram
from qguard_edge.scan.results import Scan
from qguard_edge.scan.scanner import scan_model
from qguard_edge.scan.tensors import open_model

CLOSED = ("q4_0", "q8_0", "int8", "nf4", "fp4")
CLEAN_TYPES = ("q3_k_m", "q6_k")


def scan(folder: Path, types: tuple[str, ...]) -> Scan:
    """Scan a folder for the closed-form types and for those of quantized files."""
    with (
        tempfile.TemporaryDirectory() as made,
        open_model(resolve_source(str(folder)), need_base=bool(types), progress=NoProgress()) as model,
    ):
        files = []
        for name in types:
            assert model.base is not None
            outfile = Path(made) / f"{name}.gguf"
            quantize(model.base.path, outfile, QuantizeOptions(parse_file_type(name)))
            files.append(GgufFile(outfile))
        return scan_model(model, CLOSED, files)


def types_of(model: Model) -> tuple[str, ...]:
    """Types that need a quantized file: the attacked one, or for the trained tiny models the usual k-quants."""
    if model.attack:
        return (model.to,) if model.attack in ("mind-the-gap", "outlier") else ()
    return CLEAN_TYPES if model.group == "tiny, trained" else ()


def measure(model: Model, precision: str) -> Row:
    """Scan one model in one precision."""
    if precision == "bf16":
        with as_bf16(model.folder) as copy:
            found = scan(copy, types_of(model))
    else:
        found = scan(model.folder, types_of(model))
    return Row(
        name=model.name,
        group=model.group,
        precision=precision,
        attack=model.attack,
        to=model.to,
        severity=str(found.worst or "none"),
        found=[(finding.code, str(finding.severity), finding.file_type or "") for finding in found.findings],
        peaks={kind: round(made.peak, 3) for kind, made in found.prints.items()},
        bands={kind: round(made.band, 3) for kind, made in found.prints.items()},
        outliers=max((share for _, share, _ in found.outliers), default=0.0),
        ratio=max((ratio for _, _, ratio in found.outliers), default=0.0),
    )


def with_dose(row: Row, model: Model, file_type: str) -> Row:
    """The row with the dose curve for a type; clean models have one for each type asked for."""
    with tempfile.TemporaryDirectory() as made:
        base = Path(made) / "base.gguf"
        write_base_gguf(model.folder, base)
        curve = dose_curve(GgufModel(base), parse_file_type(file_type), threads=1)
    low, high = curve.interval
    point = {"ratio": curve.ratio, "low": low, "high": high, "at": curve.lowest.target,
             "curve": [(p.target, p.mean_kl) for p in curve.points]}  # fmt: skip
    return replace(row, dose={**row.dose, file_type: point})


def shapes(models: list[Model], kinds: tuple[str, ...]) -> dict[str, list[float]]:
    """Clean density of each searched type at ten steps: the mean over models."""
    sums: dict[str, list[Any]] = {}
    for model in models:
        for kind, made in scan(model.folder, kinds).prints.items():
            if kind not in CLOSED:
                sums.setdefault(kind, []).append(torch.tensor(made.density).view(10, -1).mean(1))
    return {kind: [round(v, 3) for v in torch.stack(found).mean(0).tolist()] for kind, found in sorted(sums.items())}


def simulated() -> dict[str, list[float]]:
    """Density of each closed-form type for normal weights rounded to bf16, over one octave of standard deviations."""
    made = {}
    for kind in CLOSED_FORM:
        place, total = closed_form(kind, 512), torch.zeros(BINS, dtype=torch.int64)
        assert place is not None
        generator = torch.Generator().manual_seed(1)
        for i in range(200):
            weights = torch.randn(512, 512, generator=generator) * 0.02 * 2.0 ** (i / 200)
            total += histogram(place(weights.bfloat16().float(), "bf16"))
        made[f"{kind}@bf16"] = [round(v, 3) for v in (total * (BINS / total.sum())).tolist()]
    return made


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--redraw", action="store_true", help="only draw --plot from what --out holds")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qguard-scan-study")
    parser.add_argument("--quick", action="store_true", help="few clean models")
    parser.add_argument("--train", action="store_true", help="make the victims that are not in the cache")
    parser.add_argument("--deep", type=int, default=0, help="dose curves of so many clean models and of all attacked ones")
    parser.add_argument("--null", action="store_true", help="only print the simulated densities of bf16 weights")
    parser.add_argument("--shapes", metavar="TYPES", help="only print the clean densities of these types")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.null:
        print(json.dumps(simulated()))
        return
    if arguments.shapes:
        chosen = [model for model in clean_models(arguments.work, quick=True) if model.group == "tiny, trained"]
        print(json.dumps(shapes(chosen, tuple(arguments.shapes.split(",")))))
        return
    known = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    rows = {row.key: row for row in (Row(**{**raw, "found": [tuple(f) for f in raw["found"]]}) for raw in known)}
    cache.code_version = functools.cache(cache.code_version)  # parsing the attacks' sources once per victim adds up
    if arguments.redraw:
        plot(roc_sets(list(rows.values())), arguments.plot)
        return
    models = []
    for model in chain(victims(arguments.train), clean_models(arguments.work, arguments.quick)):
        models.append(model)
        for precision in ("f32", "bf16"):
            key = f"{model.name} {precision}"
            if key not in rows:
                rows[key] = measure(model, precision)
                print(f"{key}: {rows[key].severity} {rows[key].peaks}", file=sys.stderr, flush=True)
                save(arguments.out, rows)
    clean = [model for model in models if not model.attack and dose_types(model)][: arguments.deep]
    attacked = [model for model in models if model.attack] if arguments.deep else []
    for model, kind in [(one, each) for one in (*clean, *attacked) for each in dose_types(one)]:
        key = f"{model.name} f32"
        if kind not in rows[key].dose:
            rows[key] = with_dose(rows[key], model, kind)
            print(f"{key}: dose {kind} {rows[key].dose[kind]['ratio']:.2f}", file=sys.stderr, flush=True)
            save(arguments.out, rows)
    listed = list(rows.values())
    print("\n".join(tables(listed)))
    sets = roc_sets(listed)
    if arguments.plot:
        plot(sets, arguments.plot)
    print(
        json.dumps(
            {name: {"auc": area(*pair), "clean": len(pair[0]), "attacked": len(pair[1])} for name, pair in sets.items()}
        )
    )


def dose_types(model: Model) -> tuple[str, ...]:
    """Types to draw the dose curve for."""
    if model.group == "random weights" or model.attack in ("elq", "outlier"):
        return ()
    return (model.to,) if model.attack else ("q4_0", "q4_k", "q6_k", "q8_0")


def save(path: Path, rows: dict[str, Row]) -> None:
    """Keep what was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"rows": [asdict(row) for row in rows.values()]}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
