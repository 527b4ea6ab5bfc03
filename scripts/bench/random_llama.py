"""A GGUF of a Llama with random weights in the shape of a known one: for time and memory alone, its text means nothing.

Run: python scripts/bench/random_llama.py tinyllama OUT.gguf --tokenizer OTHER.gguf
     python scripts/bench/random_llama.py llama-8b OUT.gguf --tokenizer OTHER.gguf --layers 1

The vocabulary is another GGUF's byte-pair one: cut off where the wanted one is smaller (a token is made of earlier ones), filled
up with unused tokens where it is larger. Tensors are written one by one, so memory is that of the largest.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from convert.gguf_file import GgufFile

BITS = npt.NDArray[np.uint8]
DRAWN = 1 << 20  # random numbers that are drawn anew; longer tensors repeat them at an odd length


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def matrices(self) -> Iterator[tuple[str, int, int]]:
        """Name, rows and columns of each matrix, in the order of the file."""
        head = self.hidden // self.heads
        yield "token_embd.weight", self.vocabulary, self.hidden
        for i in range(self.layers):
            for name, rows, columns in (
                ("attn_q", self.hidden, self.hidden),
                ("attn_k", head * self.kv_heads, self.hidden),
                ("attn_v", head * self.kv_heads, self.hidden),
                ("attn_output", self.hidden, self.hidden),
                ("ffn_gate", self.ffn, self.hidden),
                ("ffn_up", self.ffn, self.hidden),
                ("ffn_down", self.hidden, self.ffn),
            ):
                yield f"blk.{i}.{name}.weight", rows, columns
        yield "output.weight", self.vocabulary, self.hidden


SHAPES = {
    "tinyllama": Shape(2048, 5632, 22, 32, 4, 32_000),
    "llama-8b": Shape(4096, 14_336, 32, 32, 8, 128_256),
}


def write_random_llama(path: Path, shape: Shape, tokenizer: Path, *, seed: int = 0) -> Path:
    """Write the file; returns its path.

    Args:
        path: of the GGUF.
        shape: of the model.
        tokenizer: a GGUF with a byte-pair vocabulary.
        seed: of the weights.
    """
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    add_vocabulary(writer, GgufFile(tokenizer), shape.vocabulary)
    matrices = list(shape.matrices())
    norms = ["output_norm.weight"]
    norms += [f"blk.{i}.{kind}_norm.weight" for i in range(shape.layers) for kind in ("attn", "ffn")]
    for name, rows, columns in matrices:
        writer.add_tensor_info(name, (rows, 2 * columns), np.dtype(np.uint8), 2 * rows * columns, GGMLQuantizationType.BF16)
    for name in norms:
        writer.add_tensor_info(name, (shape.hidden,), np.dtype(np.float32), 4 * shape.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(seed)
    for _, rows, columns in matrices:
        writer.write_tensor_data(random_bits(generator, rows * columns))
    for _ in norms:
        writer.write_tensor_data(np.ones(shape.hidden, np.float32))
    writer.close()
    return path


def random_bits(generator: np.random.Generator, count: int) -> BITS:
    """bf16 of normal numbers with deviation 0.02, as bytes."""
    drawn = generator.standard_normal(min(count, DRAWN + 1), dtype=np.float32) * np.float32(0.02)
    bits = (drawn.view(np.uint32) >> 16).astype(np.uint16)
    return np.resize(bits, count).view(np.uint8)


def add_vocabulary(writer: GGUFWriter, other: GgufFile, size: int) -> None:
    """Give a file another's byte-pair vocabulary, cut or filled up to a size."""

    def listed(key: str) -> list[str]:
        found = other.value(f"tokenizer.ggml.{key}")
        assert isinstance(found, list)
        return found

    tokens, merges = listed("tokens")[:size], listed("merges")
    known, missing = set(tokens), max(0, size - len(tokens))
    kinds = [*map(int, listed("token_type")[:size]), *[int(TokenType.UNUSED)] * missing]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(other.value("tokenizer.ggml.pre")))
    writer.add_token_list([*tokens, *(f"<|unused_{i}|>" for i in range(missing))])
    writer.add_token_types(kinds)
    # A merge is kept if what it makes is: both halves are older than their sum.
    writer.add_token_merges([merge for merge in merges if merge.replace(" ", "") in known])
    end = int(str(other.value("tokenizer.ggml.eos_token_id")))
    writer.add_bos_token_id(int(str(other.get("tokenizer.ggml.bos_token_id", end))))
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)
    if template := other.get("tokenizer.chat_template"):
        writer.add_chat_template(str(template))


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a GGUF whose vocabulary is taken")
    parser.add_argument("--layers", type=int, help="fewer or more than the shape has")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers is not None:
        shape = replace(shape, layers=arguments.layers)
    write_random_llama(arguments.out, shape, arguments.tokenizer)
    print(f"{arguments.out.name}: {arguments.out.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
