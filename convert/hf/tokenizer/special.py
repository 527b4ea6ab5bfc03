"""Special tokens: which ids start, end and pad a text, and whether the tokenizer adds them by itself.

The same fact is written in up to five files. What counts, in order: the roles in tokenizer_config.json (and
special_tokens_map.json) by their text, then the ids in config.json and generation_config.json. Whether a BOS
is put in front is not read from a flag when it can be seen: the tokenizer's post-processor is applied to
nothing and one looks at what it adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.hf.jsonfile import MAX_TOKENIZER_BYTES, Section, read_bytes, read_optional_json
from convert.hf.tokenizer.vocabulary import Vocabulary
from quant_grids.errors import FormatError

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
TURN_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<EOT>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
)
"""Texts that llama.cpp itself takes for the end of a turn, most specific first."""
MAX_TEMPLATE_BYTES = 4 << 20


@dataclass(frozen=True)
class SpecialTokens:
    """Roles and additions.

    Attributes:
        ids: Token id by role (`bos`, `eos`, `unk`, `sep`, `pad`, `cls`, `mask`, `eot`, `eom`).
        add_bos: The tokenizer puts BOS in front.
        add_eos: The tokenizer puts EOS at the end.
        templates: Chat templates by name; the main one is `default`.
        warnings: What could not be expressed.
    """

    ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    templates: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def read_special(folder: Path, config: Section, settings: Section, vocabulary: Vocabulary, probe: Probe) -> SpecialTokens:
    """Collects the special tokens of a folder.

    Args:
        folder: The model folder.
        config: config.json.
        settings: tokenizer_config.json.
        vocabulary: The tokenizer, for ids of texts.
        probe: What the tokenizer adds to an empty text.
    """
    id_of = {text: i for i, text in enumerate(vocabulary.tokens)}
    generation = Section(read_optional_json(folder / "generation_config.json"), "generation_config.json")
    names = Section(read_optional_json(folder / "special_tokens_map.json"), "special_tokens_map.json")
    ids: dict[str, int] = {}
    for role in ROLES:
        text = _role_text(settings, role) or _role_text(names, role)
        if text is not None and text in id_of:
            ids[role] = id_of[text]
        else:
            listed = _id_list(config, role) or _id_list(generation, role)
            if listed and listed[0] < len(vocabulary.tokens):
                ids[role] = listed[0]
    for role, token_id in vocabulary.roles.items():
        ids.setdefault(role, token_id)
    warnings: list[str] = []
    add_bos, add_eos = _additions(settings, probe, ids, warnings)
    _find_turn_end(vocabulary, _id_list(generation, "eos") + _id_list(config, "eos"), ids)
    if "eos" not in ids:
        warnings.append("No end-of-text token is named anywhere; llama.cpp will assume one.")
    return SpecialTokens(ids, add_bos, add_eos, read_templates(folder, settings), tuple(warnings))


@dataclass(frozen=True)
class Probe:
    """What a tokenizer adds around a text by itself.

    Attributes:
        before: Ids added in front, or None when it could not be tried (a folder without tokenizer.json).
        after: Ids added behind.
    """

    before: tuple[int, ...] | None = None
    after: tuple[int, ...] = ()


def _role_text(section: Section, role: str) -> str | None:
    """The text of a role's token, given as a string or as an object with `content`."""
    entry = section.values.get(f"{role}_token")
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) and entry else None


def _id_list(section: Section, role: str) -> list[int]:
    """The id or ids of a role in a configuration; nonsense reads as none."""
    entry = section.values.get(f"{role}_token_id")
    entries: Sequence[Any] = entry if isinstance(entry, list) else [entry]
    return [i for i in entries if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _additions(settings: Section, probe: Probe, ids: dict[str, int], warnings: list[str]) -> tuple[bool, bool]:
    """Whether BOS and EOS are added; makes the added tokens BOS and EOS when no role names them."""
    before, after = probe.before or (), probe.after
    if before:
        ids.setdefault("bos", before[0])
    if after:
        ids.setdefault("eos", after[-1])
    if list(before) not in ([], [ids.get("bos")]) or list(after) not in ([], [ids.get("eos")]):
        warnings.append(
            f"The tokenizer adds the tokens {list(before)} in front of a text and {list(after)} behind it; "
            "llama.cpp can only add BOS and EOS."
        )
    if probe.before is None:
        # SentencePiece models in transformers add BOS unless told otherwise.
        found = {"bos": True, "eos": False}
    else:
        found = {"bos": ids.get("bos") in before, "eos": ids.get("eos") in after}
    for role in found:
        # A flag in tokenizer_config.json makes transformers rebuild the post-processor, so it wins.
        flag = settings.values.get(f"add_{role}_token")
        if isinstance(flag, bool):
            found[role] = flag
        # llama.cpp aborts when it is told to add a token it does not have.
        if found[role] and role not in ids:
            found[role] = False
    return found["bos"], found["eos"]


def _find_turn_end(vocabulary: Vocabulary, stops: list[int], ids: dict[str, int]) -> None:
    """Names the end-of-turn token; llama.cpp would pick by hash order among several candidates."""
    added = {token.text: token.id for token in vocabulary.added}
    if "<|eom_id|>" in added:
        ids["eom"] = added["<|eom_id|>"]
    for text in TURN_ENDS:
        if text in added:
            ids["eot"] = added[text]
            break
    for stop in stops:
        # A stop that llama.cpp would not recognise by its text has no other place than this one.
        known = stop in ids.values() or stop >= len(vocabulary.tokens) or vocabulary.tokens[stop] in TURN_ENDS
        if not known:
            ids["eot"] = stop
            return


def read_templates(folder: Path, settings: Section) -> dict[str, str]:
    """Chat templates: tokenizer_config.json's own, or the .jinja files that newer versions write beside it.

    Raises:
        FormatError: A template that is not text, or is larger than any real one.
    """
    templates: dict[str, str] = {}
    own = settings.values.get("chat_template")
    main = folder / "chat_template.jinja"
    if isinstance(own, str):
        templates["default"] = own
    elif isinstance(own, list):
        for entry in own:
            if isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
                templates[entry["name"]] = str(entry.get("template", ""))
    elif main.exists():
        templates["default"] = _template_file(main)
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            templates[path.stem] = _template_file(path)
    else:
        other = read_optional_json(folder / "chat_template.json", MAX_TOKENIZER_BYTES).get("chat_template")
        if isinstance(other, str):
            templates["default"] = other
    return {name: text for name, text in templates.items() if text}


def _template_file(path: Path) -> str:
    try:
        return read_bytes(path, MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path.name} is not UTF-8 text.") from error
