"""What an answer of a server may cost: each of these servers held `check --server` for ever, or broke it."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from qguard_edge.packs.transport import KEY_VARIABLE, Connection, ServerError

Talk = Callable[[socket.socket], None]
SECONDS = 0.5


def drip(text: bytes, again: bytes) -> Talk:
    """Say `text`, then `again` for ever, a little at a time."""

    def talk(client: socket.socket) -> None:
        client.sendall(text)
        while True:
            client.sendall(again)
            time.sleep(0.02)

    return talk


@pytest.fixture
def listen() -> Iterator[Callable[[Talk], str]]:
    """A server that reads a request and then talks as the test wants; its URL."""
    servers: list[socket.socket] = []

    def start(talk: Talk) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def serve() -> None:
            with suppress(OSError):
                client, _ = server.accept()
                with client:
                    client.recv(1 << 16)
                    talk(client)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield start
    for server in servers:
        server.close()


SLOW = {
    "a body byte by byte": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"),
    "a body without an end": drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    "a status line byte by byte": drip(b"HTTP/1.1 200 O", b"K"),
    "headers byte by byte": drip(b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "100 Continue, again and again": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunks without an end": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "silence": lambda client: time.sleep(20),
}


@pytest.mark.parametrize("talk", SLOW.values(), ids=SLOW.keys())
def test_an_answer_has_a_time_in_all(talk: Talk, listen: Callable[[Talk], str]) -> None:
    started = time.monotonic()
    with pytest.raises(ServerError, match=r"took more than 0\.5 s for one answer"):
        Connection(listen(talk), timeout=SECONDS).post("/completion", {})
    assert time.monotonic() - started < 5 * SECONDS


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\0" * 100,
        b"HTTP/9.9 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 99999,
    ],
)
def test_what_is_not_http_is_one_sentence(said: bytes, listen: Callable[[Talk], str]) -> None:
    with suppress(ServerError):
        assert Connection(listen(lambda client: client.sendall(said)), timeout=5).get("/") == (200, None)


@pytest.mark.parametrize("url", ["http://h:99999", "http://h:x", "http://[::1", "ftp://h", "http://u:p@h", "h:80", ""])
def test_an_address_that_is_none(url: str) -> None:
    """`--server http://h:99999` was an internal error."""
    with pytest.raises(ServerError, match="--server"):
        Connection(url)


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret\n")
    with pytest.raises(ServerError) as caught:
        Connection("http://127.0.0.1:9", timeout=1).get("/")
    assert "secret" not in str(caught.value)
