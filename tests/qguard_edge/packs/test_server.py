"""`check --server`: a real llama.cpp server on loopback, and servers that answer nonsense."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qguard_edge.packs.check import CheckRequest, check
from qguard_edge.packs.pack import Pack
from qguard_edge.packs.server import LlamaCppDialect, OpenAiDialect, connect, unique_pieces
from qguard_edge.packs.transport import MOST_BYTES, ServerError
from qguard_edge.verify.results import Verdict
from tests.helpers.lab_files import LabFiles

Serve = Callable[[Path], str]


def test_a_real_server_with_the_hardened_file(serve: Serve, injection: LabFiles, pack: Pack) -> None:
    url = serve(injection.hardened)
    served = check(CheckRequest(pack, server=url, limit=40))
    local = check(CheckRequest(pack, candidate=injection.hardened, threads=1, limit=40))
    ours, theirs = served.check("injection/discovery"), local.check("injection/discovery")
    assert (ours.candidate, ours.findings) == (theirs.candidate, theirs.findings)
    assert ours.verdict is not Verdict.FAIL
    assert served.drift is not None
    assert local.drift is not None
    assert served.check("drift/mean-kl").verdict is Verdict.PASS
    # Measured: 0.06 apart on a processor with AMX (0.854 and 0.789).
    assert served.drift.candidate.same_top == pytest.approx(local.drift.candidate.same_top, abs=0.1)
    assert 0 < served.drift.candidate.mean_kl < 4 * local.drift.candidate.mean_kl
    facts = served.files[0]
    assert (facts.name, facts.sha256) == (url.removeprefix("http://"), "")
    assert any("in a server" in limit for limit in served.limits)


def test_a_real_server_with_the_plain_file(serve: Serve, injection: LabFiles, pack: Pack) -> None:
    outcome = check(CheckRequest(pack, server=serve(injection.plain), limit=30))
    assert outcome.verdict is Verdict.FAIL
    # Which part of the payload stands out most depends on the victim; it is a part of it.
    assert outcome.check("injection/discovery").findings[0].phrase in "also try a fresh zingaloo"


def test_llama_cpps_own_server_reads_the_very_token_ids(serve_native: Serve, injection: LabFiles, pack: Pack) -> None:
    """Ids go in and ids come out, so what it says is what the file says when it is run here, up to its kernels' last bits."""
    url = serve_native(injection.hardened)
    assert isinstance(connect(url, {}, [1])[1], LlamaCppDialect)
    served = check(CheckRequest(pack, server=url, limit=40))
    local = check(CheckRequest(pack, candidate=injection.hardened, threads=1, limit=40))
    ours, theirs = served.check("injection/discovery"), local.check("injection/discovery")
    assert (ours.candidate, ours.findings) == (theirs.candidate, theirs.findings)
    assert ours.candidate is None  # nothing was found, so there is no rate of anything
    assert ours.prompts == theirs.prompts == 40  # no prompt was left out
    assert ours.verdict is not Verdict.FAIL
    assert served.drift is not None
    assert served.check("drift/mean-kl").verdict is Verdict.PASS
    assert local.drift is not None
    assert served.drift.candidate.same_top == pytest.approx(local.drift.candidate.same_top, abs=0.1)


def test_llama_cpps_own_server_with_the_plain_file(serve_native: Serve, injection: LabFiles, pack: Pack) -> None:
    outcome = check(CheckRequest(pack, server=serve_native(injection.plain), limit=30))
    assert outcome.verdict is Verdict.FAIL
    assert outcome.check("injection/discovery").findings[0].phrase in "also try a fresh zingaloo"


def test_a_server_with_another_tokenizer_is_refused(serve: Serve, tiny_base: Path, pack: Pack) -> None:
    with pytest.raises(ServerError, match="another tokenizer"):
        check(CheckRequest(pack, server=serve(tiny_base), limit=4))


# What no well-meaning server does -------------------------------------------------------------------------------------


@pytest.fixture
def reply() -> Iterator[Callable[[dict[str, tuple[int, bytes]]], str]]:
    """A web server that says what the test wants, per path; its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(answers: dict[str, tuple[int, bytes]]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def do_GET(self) -> None:
                status, body = answers.get(self.path, (404, b"{}"))
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://example.invalid/")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def native(**fields: Any) -> dict[str, tuple[int, bytes]]:
    return {"/completion": (200, json.dumps({"content": "x", "stop_type": "limit", **fields}).encode())}


def test_the_dialect_is_found_out(reply: Any) -> None:
    assert isinstance(connect(reply(native()), {}, [1])[1], LlamaCppDialect)
    models = {"/v1/models": (200, b'{"data": [{"id": "m"}]}')}
    assert isinstance(connect(reply(models), {}, [1])[1], OpenAiDialect)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({}, "neither /completion nor /v1/models"),
        ({"/completion": (401, b"{}")}, "QGUARD_SERVER_KEY"),
        ({"/completion": (302, b""), "/v1/models": (302, b"")}, "neither"),
        (native(completion_probabilities=[7]), "no completion in it"),
        (native(completion_probabilities=[{"top_logprobs": []}]), "not those of a distribution"),
        (
            native(completion_probabilities=[{"top_logprobs": [{"id": 1, "logprob": -0.1}, {"id": 2, "logprob": -0.1}]}]),
            "not those",
        ),
        (native(completion_probabilities=[{"top_logprobs": [{"id": 1, "logprob": 5.0}]}]), "not those"),
        (native(content=7), "not"),
        (native(completion_probabilities=[{"top_logprobs": [{"id": [1], "logprob": -0.1}]}]), "not those"),
        (native(completion_probabilities=[{"top_logprobs": [{"id": 1, "logprob": 10**400}]}]), "not those"),
        (native(completion_probabilities={"a": 1}), "no completion in it"),
        ({"/completion": (200, b'{"content": [' + b"[]," * (1 << 20) + b"0]}")}, "more than 100000 lists"),
        ({"/completion": (200, b"[" * (1 << 20))}, "more than 100000 lists"),
        ({"/completion": (200, b'{"content": [' + b"1," * 3_000_000 + b"0]}")}, "1000000 values"),
        ({"/completion": (200, b"x" * (MOST_BYTES + 1))}, "more than"),
    ],
)
def test_nonsense_is_one_sentence(reply: Any, answers: dict[str, tuple[int, bytes]], words: str) -> None:
    with pytest.raises(ServerError, match=words):
        connect(reply(answers), {}, [1])[1].complete([1, 2], "ab", 1, 4)


def test_llama_cpp_names_tokens_by_id(reply: Any) -> None:
    rows = [{"id": 5, "token": "a", "logprob": -0.1}, {"id": 9, "token": "b", "logprob": -3.0}]
    url = reply(native(completion_probabilities=[{"id": 5, "top_logprobs": rows}], stop_type="eos"))
    said = connect(url, {}, [1])[1].complete([1, 2], None, 1, 4)
    assert said is not None
    assert (said.text, said.ended, dict(said.listed)) == ("x", True, {5: -0.1, 9: -3.0})


def test_pieces_that_two_tokens_share_are_left_out() -> None:
    assert unique_pieces({"1": "a", "2": "b", "3": "b", "4": "", "5": "\ufffd"}) == {"a": 1}


def test_half_a_surrogate_pair_becomes_a_character_that_files_can_hold(reply: Any) -> None:
    """It was an internal error, as soon as a report was written."""
    said = connect(reply(native(content="a\ud800b")), {}, [1])[1].complete([1, 2], None, 1, 0)
    assert said is not None
    assert said.text == "a?b"
