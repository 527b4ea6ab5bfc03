"""What a conversion asks of whoever looks at the model first (`qguard_edge.scan.guard`)."""

from typing import Protocol

from convert.gguf_file import GgufFile, GgufModel
from qguard_edge.source import Source


class Guard(Protocol):
    """Looks at a model before it is converted, and may refuse by raising.

    The calls about a GGUF return `--tensor-type` pairs that llama.cpp is to follow before the user's own.
    """

    def before(self, base: GgufModel) -> tuple[tuple[str, str], ...]:
        """Called when the base is there."""

    def after(self, base: GgufModel, reference: GgufFile) -> tuple[tuple[str, str], ...]:
        """Called when llama.cpp has quantized it; if it returns anything, llama.cpp has to quantize once more."""

    def before_folder(self, source: Source, kinds: tuple[str, ...]) -> None:
        """Called instead of both before a folder is made for these formats of bitsandbytes."""
