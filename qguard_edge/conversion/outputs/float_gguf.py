"""A full-precision GGUF (`--to f32|f16|bf16`): nothing is quantized, so there is nothing to defend."""

from pathlib import Path

from convert.hashes import sha256_of
from convert.outputs import files_of
from convert.quantizer import QuantizeReport
from qguard_edge.conversion.outputs.base import Job
from qguard_edge.conversion.outputs.gguf_family import GgufFamily
from qguard_edge.conversion.report import ConversionReport, GgufReport
from qguard_edge.conversion.request import GgufRequest


class FloatGgufOutput(GgufFamily[GgufRequest, GgufReport]):
    """See the module docstring."""

    rounds = False
    converted: QuantizeReport | None = None

    def base_type(self) -> str:
        """See `GgufFamily.base_type`."""
        return self.request.options.file_type.name.lower()

    def write(self, job: Job) -> Path:
        """See `Output.write`: a base from a folder has the right type already; llama.cpp changes that of a GGUF."""
        if not self.source.is_gguf:
            return self.base.path
        made = job.work / "converted.gguf"
        with job.clock.stage("convert"):
            self.converted = self.quantize(self.base.path, made, job.progress)
        return made

    def hashes(self, job: Job, made: Path) -> dict[str, str]:
        """See `Output.hashes`."""
        return {"output": sha256_of(files_of(made))}

    def report(self, common: ConversionReport) -> GgufReport:
        """See `Output.report`."""
        return common.extended(
            GgufReport,
            file_type=self.request.options.file_type,
            quantized=self.converted,
            base_bytes=common.out_bytes,
            mmproj=self.mmproj_made,
        )
