"""The scan inside `convert`: once before llama.cpp quantizes, once when its file is there.

Before: sanity and outliers, which need nothing but the base. After: box fingerprints, for exactly the types that llama.cpp
chose for each tensor. A dangerous finding refuses the conversion, is accepted, or keeps the flagged tensors in full
precision: their names go to llama.cpp as `--tensor-type NAME=f16`, and it quantizes again.
"""

import re
from dataclasses import dataclass, field

from gguf import GGMLQuantizationType

from convert.gguf_file import GgufFile, GgufModel
from convert.source import Source
from convert.tensor_io import FLOAT_TYPES
from qguard_edge.progress import NoProgress, Progress
from qguard_edge.scan.findings import Finding, Severity, in_order
from qguard_edge.scan.scanner import scan_model
from qguard_edge.scan.tensors import ScanModel, from_base, is_matrix, open_model
from quant_grids.errors import QGuardError, UnsupportedError
from quant_grids.ggml_type import GgmlType

TensorTypes = tuple[tuple[str, str], ...]


class RefusedError(QGuardError):
    """The scan found something dangerous, and the user did not accept it.

    Attributes:
        findings: everything that was found.
    """

    def __init__(self, findings: tuple[Finding, ...]) -> None:
        first = next(finding for finding in findings if finding.severity is Severity.DANGEROUS)
        self.findings = findings
        super().__init__(
            f"{first.code}: {first.message}. Nothing was written. `qguard-edge scan` shows more; --accept-findings converts "
            "anyway, --keep-flagged-f16 keeps the flagged tensors in full precision"
        )


@dataclass
class ScanGuard:
    """See the module docstring.

    Attributes:
        accept: convert whatever is found.
        keep: keep flagged tensors in full precision.
        threads: 0 for one per core.
        progress: told the number of weights done.
        findings: what was found, after the conversion.
        kept: names of the tensors that stayed in full precision.
    """

    accept: bool = False
    keep: bool = False
    threads: int = 0
    progress: Progress = field(default_factory=NoProgress)
    findings: tuple[Finding, ...] = ()
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a contradiction.

        Raises:
            UnsupportedError: both `accept` and `keep`.
        """
        if self.accept and self.keep:
            raise UnsupportedError(
                "--accept-findings quantizes flagged tensors and --keep-flagged-f16 does not: give one of them"
            )

    def before(self, base: GgufModel) -> TensorTypes:
        """Look at the base.

        Returns:
            Types to give to llama.cpp, before the user's own.

        Raises:
            RefusedError: something dangerous.
        """
        return self._decide(base, ())

    def after(self, base: GgufModel, plain: GgufFile) -> TensorTypes:
        """Look at the base in the light of what llama.cpp made of it; as `before`. Not empty: quantize again with these.

        Raises:
            RefusedError: something dangerous.
        """
        return self._decide(base, (plain,))

    def folder(self, source: Source, kinds: tuple[str, ...]) -> None:
        """Look at a Hugging Face folder that is to be rounded to formats of bitsandbytes.

        Raises:
            RefusedError: something dangerous.
        """
        with open_model(source, need_base=False, progress=self.progress) as model:
            dangerous = self._look(model, kinds, ())
        if dangerous and not self.accept:
            raise RefusedError(self.findings)

    def _look(self, model: ScanModel, kinds: tuple[str, ...], plain: tuple[GgufFile, ...]) -> list[Finding]:
        """Scan, note what is new, and return what of that is dangerous."""
        found = scan_model(model, kinds, plain, threads=self.threads, progress=self.progress).findings
        known = {(finding.code, finding.file_type) for finding in self.findings}
        new = [finding for finding in found if (finding.code, finding.file_type) not in known]
        self.findings = in_order([*self.findings, *new])
        return [finding for finding in new if finding.severity is Severity.DANGEROUS]

    def _decide(self, base: GgufModel, plain: tuple[GgufFile, ...]) -> TensorTypes:
        dangerous = self._look(from_base(base, base.path.stem, base.path), (), plain)
        if not dangerous or (self.accept and not self.keep):
            return ()
        if not self.keep or any(finding.code == "QG101" for finding in dangerous):
            raise RefusedError(self.findings)
        names = [name for finding in dangerous for name in finding.tensors]
        flagged = tuple(name for name in dict.fromkeys(names) if name not in self.kept and is_matrix(base.tensors[name]))
        self.kept = (*self.kept, *flagged)
        return tuple((f"^{re.escape(name)}$", _full_precision(base.tensors[name].ggml_type)) for name in flagged)


def _full_precision(stored: GgmlType) -> str:
    """The 16-bit type for a tensor of the base: bf16 stays bf16; f32 becomes bf16 too, for an outlier may not fit f16."""
    assert stored in FLOAT_TYPES
    return "f16" if stored == GGMLQuantizationType.F16 else "bf16"
