"""HTTP with a server that may be anybody's: what one answer may cost is decided here, not there.

An answer has a number of seconds in all, from the first byte sent to the last one read: a timer cuts the connection, so neither
a body that comes byte by byte, nor headers without end, nor one `100 Continue` after another is waited for. Its size is limited,
and so is the number of objects it would become: thirty megabytes of `[[],[],...` took 1.7 GB. No proxy or redirect is followed.
"""

import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from quant_grids.errors import QGuardError

KEY_VARIABLE = "QGUARD_SERVER_KEY"
MOST_BYTES = 8 << 20
MOST_CONTAINERS = 100_000
"""Lists and objects of an answer; the longest list that is asked for, 4,000 tokens, has some 8,000."""
MOST_VALUES = 1_000_000


class ServerError(QGuardError):
    """The server cannot be reached, or its answers are not those of a completion server."""


class Connection:
    """POST and GET of JSON below one address.

    Args:
        url: `http://host:port` or `https://...`, with or without a path (a final `/v1` is dropped).
        timeout: seconds that one answer may take in all.

    Raises:
        ServerError: it is no such address.
    """

    def __init__(self, url: str, timeout: float = 300.0) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ServerError(f"--server {url!r} is not an address such as http://127.0.0.1:8080 ({error})") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"--server {url!r} is not an address such as http://127.0.0.1:8080")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ServerError(f"--server takes an address without user, query or fragment; give a key in {KEY_VARIABLE}")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self.name = f"{host}:{port}" if port else host
        self._host, self._port, self._secure = parts.hostname, port, parts.scheme == "https"
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout = timeout

    def post(self, path: str, document: Mapping[str, Any]) -> tuple[int, Any]:
        """Status and JSON answer; the answer is None when it is not JSON."""
        return self._request("POST", path, json.dumps(document).encode())

    def get(self, path: str) -> tuple[int, Any]:
        """As `post`, without a body."""
        return self._request("GET", path, None)

    def _request(self, method: str, path: str, body: bytes | None) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        make = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        late = threading.Event()
        try:
            connection = make(self._host, self._port, timeout=self._timeout)
            with _cut_off(connection, self._timeout, late):
                connection.request(method, self._path + path, body, headers)
                answer = connection.getresponse()
                raw = answer.read(MOST_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise self._too_slow() from error
            raise ServerError(f"the server at {self.name} does not answer: {str(error) or type(error).__name__}") from error
        except ValueError as error:  # not its text: it could hold the key
            raise ServerError(f"the address of the server or the key in {KEY_VARIABLE} cannot be sent over HTTP") from error
        if late.is_set():
            raise self._too_slow()
        return int(answer.status), self._json(raw)

    def _too_slow(self) -> ServerError:
        return ServerError(f"the server at {self.name} took more than {self._timeout:g} s for one answer")

    def _json(self, raw: bytes) -> Any:
        if len(raw) > MOST_BYTES:
            raise ServerError(f"the server at {self.name} sent more than {MOST_BYTES} bytes for one prompt")
        if raw.count(b"[") + raw.count(b"{") > MOST_CONTAINERS or raw.count(b",") > MOST_VALUES:
            raise ServerError(
                f"the server at {self.name} sent more than {MOST_CONTAINERS} lists or {MOST_VALUES} values for one prompt"
            )
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            return None


@contextmanager
def _cut_off(connection: http.client.HTTPConnection, seconds: float, late: threading.Event) -> Iterator[None]:
    """Close the connection at the end of the block, or after a number of seconds whatever it is doing."""
    opened: list[socket.socket] = []

    def connect(*arguments: Any) -> socket.socket:
        made = socket.create_connection(*arguments)
        # A second handle: http.client drops its own when the answer is to close the connection, TLS when it takes over.
        opened.append(made.dup())
        return made

    def cut() -> None:
        late.set()
        for handle in opened:
            with suppress(OSError):
                handle.shutdown(socket.SHUT_RDWR)

    connection._create_connection = connect  # type: ignore[attr-defined]
    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        connection.close()
        for handle in opened:
            handle.close()
