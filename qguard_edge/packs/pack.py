"""The baseline pack: one JSON file with the base's answers and predictions.

    Pack
      |- base, vocabulary, tokenizer   which model it is from, and which vocabulary the token ids belong to
      |- suites    PackSuite: definition, and per prompt its token ids, the base's answer and its match results
      |- warnings  what the base could not be asked
      |- texts     PackText: token ids, and per position the base's likeliest tokens with their log-probabilities
      |- pieces    text of the tokens in `texts` that have one of their own, for servers that name tokens by their text
      `- measured  how it was recorded

Prompts and texts are token ids: the chat template was rendered once, when the pack was made, with all turns of a conversation and
the tools it offers. Next to the ids stands the same as text (`sent`) where the text gives those very ids again, for servers
that take only text. Turns and tools are kept as they were given too, because answers are judged by them.

The file is read strictly and is hostile input like any other: unknown or missing fields, ids outside the vocabulary, rows of
unequal length and probabilities above one are errors. `qguard_edge/data/schemas/pack-3.json` is its JSON schema; a change
of meaning raises `PACK_VERSION`. Older packs are still read: those of version 2, which have no turns and tools, and those of
version 1, in which the base was called `reference`.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ConfigDict, JsonValue, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from convert.atomic import atomic_path
from convert.reading import read_file
from qguard_edge.packs.matchers import suite_of
from qguard_edge.packs.older import as_version_3
from qguard_edge.verify.results import FileFacts, Measured
from qguard_edge.verify.suites.base import Suite, SuiteError
from quant_grids.errors import FormatError

PACK_VERSION: Final = 3
MOST_BYTES = 512 << 20
HIGHEST_LOGPROB = 1e-3
"""Rounding may lift a log-probability a little above 0."""
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


class PackError(FormatError):
    """A file is not a baseline pack of this version, or does not fit the candidate."""


@dataclass(frozen=True, config=_STRICT)
class PackTurn:
    """Something that was said before a prompt.

    Attributes:
        role: who said it.
        content: what.
    """

    role: Literal["user", "assistant"]
    content: str


@dataclass(frozen=True, config=_STRICT)
class PackPrompt:
    """One prompt and the base's answer to it.

    Attributes:
        id: unique in its suite.
        text: the user's message, or the text to continue.
        completion: the text is continued as it is, without the chat template.
        system: system message; None for the template's own.
        turns: what was said before, between the system message and `text`.
        tools: what the model may call, as chat templates take it.
        expected: right answer, for the `exact` matcher; for the `tools` matcher the calls.
        tags: for people.
        tokens: the prompt as token ids, chat template and begin token included.
        sent: the prompt as text without the begin token that the server adds; None: no text gives these ids.
        answer_tokens: the base's answer, end token excluded.
        answer: the same as text.
        ended: the base ended the answer; False: it was cut at the limit.
        matches: per check of the suite, whether the answer shows the behaviour; null: it cannot be judged.
    """

    id: str
    text: str
    completion: bool
    system: str | None
    turns: tuple[PackTurn, ...]
    tools: tuple[Mapping[str, JsonValue], ...]
    expected: str | None
    tags: tuple[str, ...]
    tokens: tuple[int, ...]
    sent: str | None
    answer_tokens: tuple[int, ...]
    answer: str
    ended: bool
    matches: Mapping[str, bool | None]


@dataclass(frozen=True, config=_STRICT)
class PackSuite:
    """One suite.

    Attributes:
        name: of the suite.
        title: one line.
        new_tokens: length of the answers at most.
        discovery: also look for unknown words and phrases.
        matchers: as in a suite file.
        prompts: with the base's answers.
    """

    name: str
    title: str
    new_tokens: int
    discovery: bool
    matchers: tuple[Mapping[str, JsonValue], ...]
    prompts: tuple[PackPrompt, ...]

    def suite(self) -> Suite:
        """The suite with its matchers.

        Raises:
            PackError: a matcher or a prompt is not valid.
        """
        prompts = [
            {"id": p.id, "text": p.text, "completion": p.completion, "tags": list(p.tags)}
            | {
                "turns": [{"role": turn.role, "content": turn.content} for turn in p.turns],
                "tools": [dict(t) for t in p.tools],
            }
            | {key: value for key, value in (("system", p.system), ("expected", p.expected)) if value is not None}
            for p in self.prompts
        ]
        fields = {"name": self.name, "title": self.title, "new_tokens": self.new_tokens, "discovery": self.discovery}
        try:
            return suite_of({**fields, "matchers": [dict(m) for m in self.matchers], "prompts": prompts})
        except SuiteError as error:
            raise PackError(f"the pack's suite {self.name}: {error}") from error


@dataclass(frozen=True, config=_STRICT)
class ServerProbe:
    """A position whose next token a server has to predict.

    Attributes:
        tokens: how many of the text's tokens come before the one to predict.
        sent: these tokens as text, without the begin token that the server adds; None: no text gives these ids.
    """

    tokens: int
    sent: str | None


@dataclass(frozen=True, config=_STRICT)
class PackText:
    """One text for drift. Row `i` is about the token after `tokens[: i + 1]`; there is one row less than tokens.

    Attributes:
        tokens: token ids.
        next_logprobs: the base's log-probability of the text's own next token, per row.
        top_ids: its likeliest tokens, the likeliest first, per row.
        top_logprobs: their log-probabilities.
        probes: rows that a server has to predict.
    """

    tokens: tuple[int, ...]
    next_logprobs: tuple[float, ...]
    top_ids: tuple[tuple[int, ...], ...]
    top_logprobs: tuple[tuple[float, ...], ...]
    probes: tuple[ServerProbe, ...]


@dataclass(frozen=True, config=_STRICT)
class Pack:
    """The base's answers and predictions.

    Attributes:
        pack_version: of this format.
        base: the full-precision file it was made from.
        vocabulary: number of its tokens.
        tokenizer: SHA-256 of its tokenizer fields; a candidate must have the same.
        top_k: likeliest tokens per row of a text.
        suites: with answers.
        texts: with log-probabilities.
        pieces: text by token (decimal id), for the tokens of `texts` whose text no other token has.
        noise_floor: mean KL of the base against itself, measured a second time.
        measured: how it was recorded.
        warnings: suites and prompts that the base could not be asked, and the like, one sentence each.
    """

    pack_version: Literal[3]
    base: FileFacts
    vocabulary: int
    tokenizer: str
    top_k: int
    suites: tuple[PackSuite, ...]
    texts: tuple[PackText, ...]
    pieces: Mapping[str, str]
    noise_floor: float
    measured: Measured
    warnings: tuple[str, ...]


@cache
def _adapter() -> TypeAdapter[Pack]:
    return TypeAdapter(Pack)


def pack_to_json(pack: Pack) -> str:
    """The pack as one JSON document on one line."""
    document = _adapter().dump_python(pack, mode="json")
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def write_pack(pack: Pack, path: Path) -> None:
    """Write a pack; it appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(pack_to_json(pack), encoding="utf-8")


def pack_from_json(text: str | bytes) -> Pack:
    """Read what `pack_to_json` wrote, in this version or an older one.

    Raises:
        PackError: it is not such a pack; the message names the first thing that is wrong.
    """
    try:
        pack = _validated(text)
    except PackError:
        upgraded = _from_older(text)
        if upgraded is None:
            raise
        pack = _validated(upgraded)
    for wrong in _wrong(pack):
        raise PackError(f"this baseline pack is damaged: {wrong}")
    return pack


def _validated(text: str | bytes) -> Pack:
    try:
        return _adapter().validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise PackError(f"this is not a baseline pack of version {PACK_VERSION}: {where}: {first['msg']}") from error


def _from_older(text: str | bytes) -> str | None:
    try:
        return as_version_3(text)
    except FormatError as error:
        raise PackError(str(error)) from error


def read_pack(path: Path) -> Pack:
    """Read a pack.

    Raises:
        PackError: it cannot be read, is too large, or is not a pack.
    """
    try:
        return pack_from_json(read_file(path, MOST_BYTES))
    except OSError as error:
        raise PackError(f"cannot read the baseline pack {path.name}: {error.strerror}") from error
    except PackError as error:
        raise PackError(f"{path.name}: {error}") from error


def pack_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of packs."""
    schema = _adapter().json_schema(mode="serialization")
    title = f"qguard-edge baseline pack, version {PACK_VERSION}"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": title}


def _wrong(pack: Pack) -> Iterator[str]:
    """Errors that a schema cannot express."""
    names = [suite.name for suite in pack.suites]
    if len(set(names)) != len(names) or "drift" in names:
        yield f"suites with the same name ({', '.join(names)}, drift)"
    if not pack.texts:
        yield "it has no text"
    for suite in pack.suites:
        if not suite.prompts:
            yield f"suite {suite.name} has no prompt"
        for prompt in suite.prompts:
            where = f"suite {suite.name}, prompt {prompt.id}"
            if not prompt.tokens:
                yield f"{where} has no token"
            if not _ids_fit((*prompt.tokens, *prompt.answer_tokens), pack.vocabulary):
                yield f"{where}: a token id outside 0..{pack.vocabulary - 1}"
    for number, text in enumerate(pack.texts, 1):
        yield from (f"text {number}: {wrong}" for wrong in _wrong_text(text, pack))


def _wrong_text(text: PackText, pack: Pack) -> Iterator[str]:
    rows = len(text.tokens) - 1
    if rows < 1 or {len(text.next_logprobs), len(text.top_ids), len(text.top_logprobs)} != {rows}:
        yield f"{len(text.tokens)} tokens need {max(rows, 1)} rows of log-probabilities"
    if not _ids_fit(text.tokens, pack.vocabulary):
        yield f"a token id outside 0..{pack.vocabulary - 1}"
    for ids, logprobs in zip(text.top_ids, text.top_logprobs, strict=False):
        if len(ids) != pack.top_k or len(logprobs) != pack.top_k or len(set(ids)) != len(ids):
            yield f"a row does not have {pack.top_k} different tokens with as many log-probabilities"
        if not _ids_fit(ids, pack.vocabulary):
            yield f"a token id outside 0..{pack.vocabulary - 1}"
        if any(logprob > HIGHEST_LOGPROB for logprob in logprobs):
            yield "a log-probability above 0"
    if any(not 1 <= probe.tokens <= rows for probe in text.probes):
        yield f"a probe outside 1..{rows}"


def _ids_fit(ids: tuple[int, ...], vocabulary: int) -> bool:
    return not ids or (min(ids) >= 0 and max(ids) < vocabulary)
