"""Copies of a GGUF, written by gguf's own writer: in shards, with other fields, or under the name of another architecture."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, GGUFValueType, GGUFWriter


def copy_gguf(
    source: Path,
    target: Path,
    *,
    architecture: str = "",
    shard_tensors: int = 0,
    fields: Mapping[str, str | int] | None = None,
    more: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> list[Path]:
    """Write the same tensors and settings again.

    Args:
        source: a GGUF in one file.
        target: what to write; of shards, the name that theirs are made from.
        architecture: another one, with the same tensors and settings; empty: the same.
        shard_tensors: tensors of a shard; 0: one file.
        fields: that the copy has in place of the source's, or beside them: texts, and whole numbers as uint32.
        more: tensors that only the copy has.

    Returns:
        What was written, in order.
    """
    reader = GGUFReader(source)
    old = str(reader.fields["general.architecture"].contents())
    writer = GGUFWriter(target, architecture or old, split_max_tensors=shard_tensors)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in (fields or {}):
            own = name.removeprefix(f"{old}.")
            key = name if own == name else f"{architecture or old}.{own}"
            kind = field.types[0]
            writer.add_key_value(key, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for name, value in (fields or {}).items():
        writer.add_key_value(name, value, GGUFValueType.STRING if isinstance(value, str) else GGUFValueType.UINT32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [target] if target.exists() else sorted(target.parent.glob(f"{target.stem}-*.gguf"))
