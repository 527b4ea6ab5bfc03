"""A tokenizer written into a GGUF without weights, loaded back by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import gguf

from convert.hf.jsonfile import Section
from convert.hf.tokenizer import Tokenizer, read_tokenizer
from qguard_edge.runtimes.llama_native import NativeModel


def vocab_gguf(folder: Path, outfile: Path, rows: int, *, pre: str | None = None) -> Tokenizer:
    """Converts a folder's tokenizer alone; the file has no tensors, so it loads with `vocab_only`."""
    config_path = folder / "config.json"
    config = Section(json.loads(config_path.read_text()) if config_path.exists() else {}, "config.json")
    tokenizer = read_tokenizer(folder, config, rows, pre=pre)
    writer = gguf.GGUFWriter(path=None, arch="llama")
    tokenizer.write(writer)
    writer.write_header_to_file(path=outfile)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return tokenizer


def load_vocab(path: Path) -> NativeModel:
    return NativeModel(path, vocab_only=True)
