"""The baseline pack of a backdoored model, and a real llama.cpp server on loopback."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qguard_edge.packs.pack import Pack, pack_to_json
from qguard_edge.packs.record import BaselineRequest, record
from tests import helpers
from tests.helpers.lab_files import TEXTS, LabFiles


@pytest.fixture(scope="session")
def pack(injection: LabFiles) -> Pack:
    return record(BaselineRequest(injection.attacked, (injection.suite,), TEXTS, threads=1))


@pytest.fixture(scope="session")
def pack_file(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pack") / "pack.json"
    path.write_text(pack_to_json(pack), encoding="utf-8")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Serve = Callable[[Path], str]


def openai_server(model: Path, port: int) -> list[str]:
    """llama-cpp-python's server: OpenAI's endpoint."""
    options = {"model": model, "host": "127.0.0.1", "port": port, "n_ctx": 512, "logits_all": "true", "n_threads": 1}
    script = str(Path(helpers.__file__).with_name("openai_server.py"))
    return [sys.executable, script, *(f"--{k}={v}" for k, v in options.items()), "--verbose=false"]


def native_server(model: Path, port: int) -> list[str]:
    """llama.cpp's own server: its /completion, and OpenAI's endpoint too."""
    return [sys.executable, str(Path(helpers.__file__).with_name("llama_server.py")), str(model), str(port)]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start llama-cpp-python's server on a file; the URL of it."""
    with serving(openai_server, tmp_path) as start:
        yield start


@pytest.fixture
def serve_native(tmp_path: Path) -> Iterator[Serve]:
    """Start llama.cpp's own server on a file; the URL of it."""
    with serving(native_server, tmp_path) as start:
        yield start


@contextmanager
def serving(command: Callable[[Path, int], list[str]], folder: Path) -> Iterator[Serve]:
    """Start servers; they end with the block."""
    started: list[subprocess.Popen[bytes]] = []

    def start(model: Path) -> str:
        port = free_port()
        log = folder / f"server-{port}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command(model, port), stdout=file, stderr=file)
        started.append(process)
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
            except OSError:
                time.sleep(0.1)
            else:
                return url
        raise AssertionError(log.read_text())

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=20)
