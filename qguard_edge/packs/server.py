"""A model behind HTTP: llama.cpp's own server, or another server with OpenAI's completion endpoint.

Two dialects; which one a server has is found out with a short request:

* `POST /completion`, llama.cpp's own: takes token ids and names tokens by id, so the candidate gets exactly the
  base's tokens;
* `POST /v1/completions`, OpenAI's: takes text, and names tokens by their text. The pack's prompts are sent as the text that gives
  the same ids, and the number of tokens that the server reports must be the number in the pack.

Answers of a server are hostile input: their time and size are bounded (`qguard_edge.packs.transport`), types and probabilities
are checked before use. A key in the environment variable `QGUARD_SERVER_KEY` is sent as bearer token.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qguard_edge.packs.transport import KEY_VARIABLE, Connection, ServerError

LONGEST_ANSWER = 1 << 20


@dataclass(frozen=True)
class ServerAnswer:
    """The server's completion of one prompt.

    Attributes:
        text: the answer.
        ended: the model ended it; False: it was cut at the limit.
        listed: log-probabilities of the likeliest first tokens, by id; empty when they were not requested or not given.
    """

    text: str
    ended: bool
    listed: Mapping[int, float]


class Dialect(Protocol):
    """One kind of completion endpoint."""

    name: str

    def complete(self, tokens: Sequence[int], sent: str | None, n_new: int, n_probs: int = 0) -> ServerAnswer | None:
        """Complete a prompt greedily; None: this prompt cannot be sent."""

    def can_name(self, token: int) -> bool:
        """Whether the token can be found in a server's list."""


class LlamaCppDialect:
    """llama.cpp's own endpoint."""

    name = "llama.cpp /completion"

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def complete(self, tokens: Sequence[int], sent: str | None, n_new: int, n_probs: int = 0) -> ServerAnswer | None:
        """See `Dialect.complete`."""
        request = {
            "prompt": list(tokens),
            "n_predict": n_new,
            "temperature": 0.0,
            "n_probs": n_probs,
            "cache_prompt": False,
            "stream": False,
        }
        status, answer = self._connection.post("/completion", request)
        fields = _good(status, answer, self._connection.name, len(tokens), n_new)
        listed: Mapping[int, float] = {}
        # The list is missing when the first token is half a character: llama.cpp then sends it with the next one.
        if n_probs and fields.get("completion_probabilities"):
            first = _item(fields.get("completion_probabilities"), self._connection.name)
            rows = first.get("top_logprobs")
            if not isinstance(rows, list):
                raise _strange(self._connection.name, "no top_logprobs; its llama.cpp may be too old")
            named = {row["id"]: row.get("logprob") for row in rows if isinstance(row, dict) and _is_id(row.get("id"))}
            listed = _probabilities(named, self)
        ended = fields.get("stop_type") == "eos" or fields.get("stopped_eos") is True
        return ServerAnswer(_text(fields.get("content"), self._connection.name), ended, listed)

    def can_name(self, token: int) -> bool:
        """See `Dialect.can_name`."""
        return True


class OpenAiDialect:
    """OpenAI's completion endpoint, which works on texts.

    Args:
        connection: to the server.
        pieces: id of each token's text; texts that two tokens share are left out.
        model: name to send; None: the server has one.
    """

    name = "OpenAI /v1/completions"

    def __init__(self, connection: Connection, pieces: Mapping[str, int], model: str | None) -> None:
        self._connection, self._pieces, self._model = connection, pieces, model
        self._named = frozenset(pieces.values())

    def complete(self, tokens: Sequence[int], sent: str | None, n_new: int, n_probs: int = 0) -> ServerAnswer | None:
        """See `Dialect.complete`."""
        if sent is None:
            return None
        request: dict[str, Any] = {"prompt": sent, "max_tokens": n_new, "temperature": 0.0, "stream": False}
        if n_probs:
            request["logprobs"] = n_probs
        if self._model:
            request["model"] = self._model
        status, answer = self._connection.post("/v1/completions", request)
        fields = _good(status, answer, self._connection.name, len(tokens), n_new)
        read = (fields.get("usage") or {}).get("prompt_tokens") if isinstance(fields.get("usage"), dict) else None
        if read != len(tokens):
            raise ServerError(
                f"the server at {self._connection.name} read a prompt as {read} tokens, the pack has {len(tokens)}: "
                "it runs a model with another tokenizer, or adds to the prompt"
            )
        choice = _item(fields.get("choices"), self._connection.name)
        listed: Mapping[int, float] = {}
        if n_probs:
            logprobs = choice.get("logprobs")
            rows = logprobs.get("top_logprobs") if isinstance(logprobs, dict) else None
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise _strange(
                    self._connection.name, "no log-probabilities (llama-cpp-python: start it with --logits_all true)"
                )
            # The list is empty when the first token ended the answer.
            first = rows[0] if rows else {}
            # Negative ids stand for tokens that have no text in the pack.
            named = {self._pieces.get(piece, -1 - i): value for i, (piece, value) in enumerate(first.items())}
            listed = _probabilities(named, self) if named else {}
        return ServerAnswer(_text(choice.get("text"), self._connection.name), choice.get("finish_reason") == "stop", listed)

    def can_name(self, token: int) -> bool:
        """See `Dialect.can_name`: only tokens with a text of their own."""
        return token in self._named


def connect(url: str, pieces: Mapping[str, str], probe: Sequence[int], timeout: float = 300.0) -> tuple[Connection, Dialect]:
    """Reach a server and find out its dialect.

    Args:
        url: of the server.
        pieces: text of tokens by decimal id.
        probe: token ids of a prompt to try.
        timeout: seconds that one answer may take in all.

    Raises:
        ServerError: it cannot be reached or has neither endpoint.
    """
    connection = Connection(url, timeout)
    status, answer = connection.post("/completion", {"prompt": list(probe), "n_predict": 1, "temperature": 0.0})
    if status == 200 and isinstance(answer, dict) and "content" in answer:
        return connection, LlamaCppDialect(connection)
    if status in (401, 403):
        raise ServerError(f"the server at {connection.name} needs a key; give it in {KEY_VARIABLE}")
    status, models = connection.get("/v1/models")
    if status != 200 or not isinstance(models, dict):
        raise ServerError(f"the server at {connection.name} has neither /completion nor /v1/models (status {status})")
    listed = models.get("data")
    model = listed[0].get("id") if isinstance(listed, list) and listed and isinstance(listed[0], dict) else None
    return connection, OpenAiDialect(connection, unique_pieces(pieces), model if isinstance(model, str) else None)


def unique_pieces(pieces: Mapping[str, str]) -> dict[str, int]:
    """Token ids by text, without texts that are empty, not plain text, or shared by two tokens."""
    count: dict[str, int] = {}
    for text in pieces.values():
        count[text] = count.get(text, 0) + 1
    return {text: int(token) for token, text in pieces.items() if text and "\ufffd" not in text and count[text] == 1}


def _good(status: int, answer: Any, name: str, n_prompt: int, n_new: int) -> Mapping[str, Any]:
    if status == 200 and isinstance(answer, dict):
        return answer
    shown = json.dumps(answer)[:200] if answer is not None else "no JSON"
    raise ServerError(
        f"the server at {name} refused a prompt (status {status}); a context must hold its {n_prompt} tokens and {n_new} new "
        f"ones (llama-server: --ctx-size); it said: {shown}"
    )


def _item(raw: Any, name: str) -> Mapping[str, Any]:
    if isinstance(raw, list) and raw and isinstance(raw[0], dict):
        return raw[0]
    raise _strange(name, "no completion in it")


def _text(raw: Any, name: str) -> str:
    if isinstance(raw, str) and len(raw) <= LONGEST_ANSWER:
        return raw.encode("utf-8", "replace").decode("utf-8")  # JSON can write half a surrogate pair, which no file can hold
    raise _strange(name, "the completion is no text, or far too long")


def _is_id(raw: Any) -> bool:
    return isinstance(raw, int) and not isinstance(raw, bool)


def _probabilities(raw: Mapping[Any, Any], dialect: "LlamaCppDialect | OpenAiDialect") -> Mapping[int, float]:
    """Only whole ids and finite log-probabilities; a total above one is refused."""
    found = {
        token: float(value)
        for token, value in raw.items()
        if _is_id(token) and isinstance(value, int | float) and -1e4 < value <= 1e-3
    }
    if not found or sum(map(math.exp, found.values())) > 1.01:
        raise ServerError(f"the server's log-probabilities ({dialect.name}) are not those of a distribution")
    return found


def _strange(name: str, what: str) -> ServerError:
    return ServerError(f"the server at {name} sent an answer that cannot be used: {what}")
