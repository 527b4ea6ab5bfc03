"""The flags of `qguard-edge convert`, in one table: name, help, where `--help` shows it, and which outputs it goes with.

The command's signature is made from this table (`with_flags`), the request from a filled-in copy of it
(`qguard_edge.cli.convert.request`).
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from qguard_edge.cli.calibration_flags import (
    PANEL,
    calib_add_option,
    calib_option,
    calib_samples_option,
    calib_seqlen_option,
    max_memory_option,
)
from qguard_edge.cli.split_flags import keep_split_option, split_max_size_option, split_max_tensors_option
from qguard_edge.defenses.options import DEFAULT_DEFENSE
from quant_grids.errors import UnsupportedError

GGUF, FLOAT, MOVED_GGUF, FOLDER, MOVED_FOLDER = "gguf", "float", "moved gguf", "folder", "moved folder"
"""Kinds of output: a hardened GGUF; f32, f16 or bf16; `--to gguf`; nf4, fp4 or int8; `--to hf`."""

OUTPUT = "Output"
MODEL = "The model"
RUNNING = "Running"
QUANTIZE = "Options that llama-quantize has too"
SCAN = "Look before converting (see `qguard-edge scan`)"
BNB = "Options of --to nf4, fp4, int8, hf, gguf"


def flag(option: Any, default: Any = None, *, panel: str | None = None, only: tuple[str, ...] = ()) -> Any:
    """One row of the table.

    Args:
        option: a `typer.Option` or `typer.Argument`.
        default: value where the flag is not given.
        panel: heading under which `--help` shows it; None: among the first.
        only: kinds of output that it goes with; empty: all.
    """
    option.rich_help_panel = panel
    return field(default=default, metadata={"option": option, "only": only})


@dataclass(frozen=True)
class ConvertFlags:
    """The table; the first ones are what most people need."""

    model: str = flag(typer.Argument(metavar="MODEL", help="Folder, hub id, or .gguf file.", show_default=False), MISSING)
    to: str = flag(
        typer.Option(
            "--to",
            metavar="TYPE",
            help="llama.cpp file type, any case: q4_k (= Q4_K_M), q8_0, ... f16; or nf4, fp4, int8, hf, gguf. Only a model that "
            "was trained for a type (QAT), on whose levels its weights lie, needs none.",
            show_default=False,
        ),
        "",
    )
    outfile: str | None = flag(
        typer.Option("-o", "--outfile", help="Output; {ftype} is replaced. Default: NAME-FTYPE.gguf in this folder.")
    )
    defense: str = flag(typer.Option(help="Rounding defense, see `qguard-edge defenses`."), DEFAULT_DEFENSE)
    verify: str | None = flag(
        typer.Option(
            metavar="[SUITES]",
            help="Verify the result before it gets its name: injection, refusal, code (separated by commas), drift or all; "
            "alone: the first three. With a failing verdict the file is written as NAME.rejected.gguf and the exit code is 1.",
        ),
        only=(GGUF, FLOAT, FOLDER, MOVED_FOLDER),
    )
    dry_run: bool = flag(
        typer.Option("--dry-run", help="Show the plan per tensor, sizes and memory; write nothing."),
        False,
        only=(GGUF, FLOAT, FOLDER, MOVED_FOLDER),
    )

    keep_plain: bool = flag(
        typer.Option("--keep-plain", help="Also keep llama.cpp's own file, as NAME.plain.gguf."),
        False,
        panel=OUTPUT,
        only=(GGUF, FLOAT),
    )
    split_max_size: str | None = flag(
        split_max_size_option(),
        panel=OUTPUT,
        only=(GGUF, FLOAT, MOVED_GGUF),
    )
    split_max_tensors: int | None = flag(
        split_max_tensors_option(),
        panel=OUTPUT,
        only=(GGUF, FLOAT, MOVED_GGUF),
    )
    keep_split: bool = flag(
        keep_split_option(),
        False,
        panel=OUTPUT,
        only=(GGUF, FLOAT, MOVED_GGUF),
    )
    overwrite: bool = flag(typer.Option("--overwrite", help="Replace an existing output."), False, panel=OUTPUT)
    no_load_check: bool = flag(
        typer.Option("--no-load-check", help="Do not load the result before it gets its name."), False, panel=OUTPUT
    )
    no_fidelity: bool = flag(
        typer.Option(
            "--no-fidelity",
            envvar="QGUARD_NO_FIDELITY",
            show_envvar=False,
            help="Do not measure how near the file is to full precision, beside plain rounding.",
        ),
        False,
        panel=OUTPUT,
    )
    verbose: bool = flag(
        typer.Option(
            "--verbose", "-v", help="Also show the table by type, times and the seed; with --dry-run every tensor."
        ),
        False,
        panel=OUTPUT,
    )
    json_output: bool = flag(typer.Option("--json", help="One JSON document on standard output."), False, panel=OUTPUT)
    report_file: Path | None = flag(
        typer.Option("--report", metavar="FILE", help="Also write the JSON document to this file."), panel=OUTPUT
    )
    card: Path | None = flag(
        typer.Option("--card", metavar="FILE", help="Also write a model card to this file, for the hub: README.md, say."),
        panel=OUTPUT,
        only=(GGUF, FLOAT),
    )
    quiet: bool = flag(typer.Option("--quiet", "-q", help="No progress, no table."), False, panel=OUTPUT)

    revision: str | None = flag(typer.Option(help="Branch, tag or commit of a hub id."), panel=MODEL)
    base_type: str | None = flag(
        typer.Option(help="Precision of the base made from a folder: f32, f16 or bf16. Default: the model's own."),
        panel=MODEL,
    )
    pre: str | None = flag(
        typer.Option(help="Force llama.cpp's pre-tokenizer name."), panel=MODEL, only=(GGUF, FLOAT, MOVED_GGUF)
    )
    converter: Path | None = flag(
        typer.Option(
            help="llama.cpp's convert_hf_to_gguf.py, for other architectures. Default: looks in LLAMA_CPP_ROOT, then at what "
            "`qguard-edge converter install` fetched."
        ),
        panel=MODEL,
        only=(GGUF, FLOAT, MOVED_GGUF),
    )
    trust_remote_code: bool = flag(
        typer.Option(
            "--trust-remote-code", help="Let that converter read a folder that brings Python code, which it may run."
        ),
        False,
        panel=MODEL,
        only=(GGUF, FLOAT, MOVED_GGUF),
    )

    mmproj: str | None = flag(
        typer.Option(
            metavar="TYPE",
            help="Also write the vision or audio half of a folder, mmproj-NAME-TYPE.gguf: f16, bf16, f32 or q8_0; by llama.cpp's "
            "converter.",
        ),
        panel=MODEL,
        only=(GGUF, FLOAT),
    )

    seed: int | None = flag(
        typer.Option(min=0, help="Repeat a conversion. Default: fresh for each, recorded in the file."), panel=RUNNING
    )
    device: str = flag(typer.Option(help="auto, cpu or cuda."), "auto", panel=RUNNING)
    threads: int = flag(typer.Option(min=0, help="Threads; 0 means all cores."), 0, panel=RUNNING)
    max_memory: str | None = flag(max_memory_option(), panel=RUNNING)

    calib: Path | None = flag(calib_option(), panel=PANEL)
    calib_add: Path | None = flag(calib_add_option(), panel=PANEL)
    calib_samples: int | None = flag(calib_samples_option(), panel=PANEL)
    calib_seqlen: int = flag(calib_seqlen_option(), 256, panel=PANEL)

    no_scan: bool = flag(typer.Option("--no-scan", help="Do not scan the model first."), False, panel=SCAN)
    accept_findings: bool = flag(
        typer.Option("--accept-findings", help="Convert even if the scan calls it dangerous."), False, panel=SCAN
    )
    keep_flagged_f16: bool = flag(
        typer.Option(
            "--keep-flagged-f16", help="Keep tensors that the scan calls dangerous in F16 or BF16; needs --verify."
        ),
        False,
        panel=SCAN,
        only=(GGUF, FLOAT),
    )

    imatrix: Path | None = flag(
        typer.Option(help="Importance matrix, GGUF or legacy .dat."), panel=QUANTIZE, only=(GGUF, FLOAT, MOVED_GGUF)
    )
    tensor_type: list[str] | None = flag(
        typer.Option(metavar="RE=TYPE", help="Type of the tensors that match; repeatable."),
        panel=QUANTIZE,
        only=(GGUF, FLOAT, MOVED_GGUF),
    )
    output_tensor_type: str | None = flag(
        typer.Option(help="Type of output.weight."), panel=QUANTIZE, only=(GGUF, FLOAT, MOVED_GGUF)
    )
    token_embedding_type: str | None = flag(
        typer.Option(help="Type of the token embeddings."), panel=QUANTIZE, only=(GGUF, FLOAT, MOVED_GGUF)
    )
    pure: bool = flag(
        typer.Option("--pure", help="No mixture: every tensor gets the same type."),
        False,
        panel=QUANTIZE,
        only=(GGUF, FLOAT, MOVED_GGUF),
    )
    no_fallback: bool = flag(
        typer.Option(
            "--no-fallback", help="Refuse where llama.cpp would store tensors as another type than the one asked for."
        ),
        False,
        panel=QUANTIZE,
        only=(GGUF, FLOAT, MOVED_GGUF),
    )
    leave_output_tensor: bool = flag(
        typer.Option("--leave-output-tensor", help="Keep output.weight as it is."),
        False,
        panel=QUANTIZE,
        only=(GGUF, FLOAT, MOVED_GGUF),
    )
    override_kv: list[str] | None = flag(
        typer.Option(metavar="KEY=TYPE:VALUE", help="Override metadata; repeatable."),
        panel=QUANTIZE,
        only=(GGUF, FLOAT, MOVED_GGUF),
    )
    allow_requantize: bool = flag(
        typer.Option("--allow-requantize", help="Accept an already quantized input."),
        False,
        panel=QUANTIZE,
        only=(GGUF, FLOAT, MOVED_GGUF),
    )
    allow_unprotected: bool = flag(
        typer.Option("--allow-unprotected", help="Accept tensors whose type no defense can reach."),
        False,
        panel=QUANTIZE,
        only=(GGUF, FLOAT, MOVED_GGUF),
    )

    qvec_text: Path | None = flag(
        typer.Option(
            metavar="FILE",
            help="Search lambda on these texts (UTF-8, separated by empty lines) instead of --qvec-strength.",
        ),
        panel="Options of --defense qvec",
        only=(GGUF, FLOAT),
    )

    target: str | None = flag(
        typer.Option(
            metavar="KIND",
            help="With --to hf: nf4, fp4, int8 or all [default: all]; with --to gguf: a llama.cpp type.",
            show_default=False,
        ),
        panel=BNB,
        only=(MOVED_GGUF, FOLDER, MOVED_FOLDER),
    )
    bnb_double_quant: bool = flag(
        typer.Option("--bnb-double-quant", help="Compress the scales of nf4 and fp4."),
        False,
        panel=BNB,
        only=(FOLDER, MOVED_FOLDER),
    )
    bnb_skip: list[str] | None = flag(
        typer.Option(metavar="NAME", help="Module to leave in its precision; repeatable."),
        panel=BNB,
        only=(FOLDER, MOVED_FOLDER),
    )

    @property
    def output(self) -> str:
        """The kind of output that `--to` asks for."""
        from convert.folder_targets import is_folder_target

        to = self.to.strip().lower()
        if is_folder_target(to):
            return MOVED_FOLDER if to == "hf" else FOLDER
        if to == "gguf":
            return MOVED_GGUF
        return FLOAT if to in ("f32", "f16", "bf16") else GGUF

    def files_read(self) -> tuple[Path | str | None, ...]:
        """Every file and folder that a conversion with these flags reads."""
        return (self.model, self.imatrix, self.calib, self.calib_add, self.qvec_text, self.converter)

    def check(self) -> None:
        """Refuse flags that mean nothing for this output, or contradict each other, rather than ignore them.

        Raises:
            UnsupportedError: naming the first.
        """
        output = self.output
        for item in fields(self):
            only = item.metadata["only"]
            if only and output not in only and getattr(self, item.name):
                raise UnsupportedError(f"--{item.name.replace('_', '-')} does not go with --to {self.to}")
        if self.no_scan and (self.accept_findings or self.keep_flagged_f16):
            given = "--accept-findings" if self.accept_findings else "--keep-flagged-f16"
            raise UnsupportedError(f"{given} answers the scan, and --no-scan leaves it out: give one of them")
        if self.qvec_text is not None and self.defense != "qvec":
            raise UnsupportedError(f"--qvec-text belongs to --defense qvec, but --defense {self.defense} was chosen")


def with_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that takes `flags: ConvertFlags, **defense_flags` one parameter per row of the table."""
    hints = get_type_hints(ConvertFlags)
    names = [item.name for item in fields(ConvertFlags)]

    def filled(**given: Any) -> Any:
        table = ConvertFlags(**{name: given.pop(name) for name in names})
        return command(table, given)

    parameters = [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if item.default is MISSING else item.default,
            annotation=Annotated[hints[item.name], item.metadata["option"]],
        )
        for item in fields(ConvertFlags)
    ]
    parameters.append(inspect.Parameter("defense_flags", inspect.Parameter.VAR_KEYWORD))
    filled.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    filled.__name__ = command.__name__
    filled.__doc__ = command.__doc__
    return filled
