"""One case of each campaign: files in an empty folder, and the commands that meet them."""

import json
import os
import random
import shutil
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.hostile.material import Material
from tests.hostile.mutate import mutated_bytes, mutated_json, mutated_safetensors

Commands = list[list[str]]
Make = Callable[[random.Random, Material, Path], Commands]
QUICK = ["--threads", "1"]
HEADER = 16_000  # bytes in which the tiny model's GGUF header lies


def gguf(rng: random.Random, sound: Material, here: Path) -> Commands:
    """A GGUF with faults in its header: readers, and now and then everything that runs llama.cpp."""
    bad = here / "bad.gguf"
    bad.write_bytes(mutated_bytes(rng, sound.base.read_bytes(), HEADER))
    commands = [["inspect", str(bad), "--tensors"], ["diff", str(bad), str(sound.base)], ["scan", str(bad), *QUICK]]
    if rng.random() < 0.1:
        options = ["--to", "q8_0", "--defense", "none", "--no-scan", "-o", str(here / "o.gguf"), *QUICK]
        commands.append(["convert", str(bad), *options])
    if rng.random() < 0.05:
        commands.append(["verify", str(bad), "--base", str(sound.base), "--suites", "drift", "--limit", "2", *QUICK])
    return commands


def folder(rng: random.Random, sound: Material, here: Path) -> Commands:
    """A model folder with faults in one of its files, or with a link or FIFO in the place of one."""
    bad = here / "model"
    shutil.copytree(sound.model, bad)
    path = rng.choice(sorted(bad.iterdir()))
    kind = rng.random()
    if kind < 0.1:
        path.unlink()
        path.symlink_to(here / "secret")
        (here / "secret").write_text("BEGIN PRIVATE KEY")
    elif kind < 0.15:
        path.unlink()
        os.mkfifo(path)
    elif path.suffix == ".json":
        path.write_bytes(mutated_json(rng, path.read_bytes()))
    else:
        path.write_bytes(mutated_safetensors(rng, path.read_bytes()))
    options = ["--to", "bf16", "--no-load-check", "-o", str(here / "o.gguf"), *QUICK]
    return [["convert", str(bad), *options], ["scan", str(bad), *QUICK]]


def template(rng: random.Random, sound: Material, here: Path) -> Commands:
    """A chat template put together from pieces that loop, grow, or reach for Python."""
    pieces = [
        "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ ''.__class__.__mro__ }}", "{% if x %}", "{% endif %}",
        "{{ 'a' * 10 ** 9 }}", "{{ messages | tojson }}", "{% set x = namespace(a=1) %}", "{{ cycler.__init__ }}",
        "{{ raise_exception('no') }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(10**9) | list }}",
        "{{ bos_token }}", "{% include '/etc/passwd' %}", "{{ 7 // 0 }}", "\x00", "{{ self }}", "{{ lipsum(n=99) }}",
    ]  # fmt: skip
    source = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 8)))
    bad = here / "model"
    shutil.copytree(sound.model, bad)
    (bad / "chat_template.jinja").write_text(source)
    (here / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    return [["template", source]]


def pack(rng: random.Random, sound: Material, here: Path) -> Commands:
    """A baseline pack with faults."""
    bad = here / "pack.json"
    bad.write_bytes(mutated_json(rng, sound.pack.read_bytes()))
    return [["check", "--server", "http://127.0.0.1:9", "--baseline", str(bad)]]


def plan(rng: random.Random, sound: Material, here: Path) -> Commands:
    """A rounding plan with faults."""
    bad = here / "plan.safetensors"
    bad.write_bytes(mutated_safetensors(rng, sound.plan.read_bytes()))
    return [["apply", str(bad), "--plain", str(sound.plain), "-o", str(here / "o.gguf")]]


def suite(rng: random.Random, sound: Material, here: Path) -> Commands:
    """A suite with faults; the base does not exist, so a sound one ends there."""
    bad = here / "s.yaml"
    bad.write_bytes(mutated_bytes(rng, sound.suite.read_bytes(), 1000))
    return [["verify", str(here / "none.gguf"), "--base", str(here / "none.gguf"), "--suite", str(bad)]]


def server(rng: random.Random, sound: Material, here: Path) -> Commands:
    """A server that says something like an answer, too slowly, too much, or broken off."""
    answer = {
        "content": "x",
        "stop_type": "eos",
        "completion_probabilities": [{"top_logprobs": [{"id": 1, "logprob": -0.1}]}],
    }
    body = mutated_json(rng, json.dumps(answer).encode())
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {rng.choice((len(body), 0, len(body) + 9))}\r\n\r\n".encode()
    said = rng.choice((head + body, head + body, head + b"[" * 200_000, b"HTTP/1.1 100 Continue\r\n\r\n" * 50, body, b""))
    said = mutated_bytes(rng, said, 60) if rng.random() < 0.3 else said
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listening.accept()
                with client:
                    client.settimeout(1)
                    client.recv(1 << 16)
                    client.sendall(said)

    threading.Thread(target=serve, daemon=True).start()
    return [["check", "--server", f"http://127.0.0.1:{listening.getsockname()[1]}", "--baseline", str(sound.pack)]]


def outputs(rng: random.Random, sound: Material, here: Path) -> Commands:
    """Output options that name inputs, each other, what exists, folders, FIFOs, links."""
    for name in ("base.gguf", "plain.gguf", "precious"):
        shutil.copyfile(sound.base if name == "base.gguf" else sound.plain, here / name)
    os.mkfifo(here / "fifo")
    (here / "dir").mkdir()
    (here / "link").symlink_to(rng.choice(("base.gguf", "nowhere", "dir", "precious")))
    names = ("base.gguf", "plain.gguf", "fifo", "dir", "link", "new", "new2", "no/where", "dir/../base.gguf", "t.txt")
    shutil.copyfile(sound.text, here / "t.txt")
    first, second = (str(here / rng.choice(names)) for _ in range(2))
    base, plain, text = (str(here / name) for name in ("base.gguf", "plain.gguf", "t.txt"))
    made = ["--defense", "none", "--no-scan", "--no-load-check", *QUICK]
    command = rng.choice((
        ["convert", base, "--to", "q8_0", "-o", first, "--report", second, *made],
        ["scan", base, "--html", first, "--sarif", second, *QUICK],
        ["apply", str(sound.plan), "--plain", plain, "-o", first],
        ["verify", plain, "--base", base, "--suites", "nonsense", "--html", first, "--junit", second],
        ["compare", base, "--to", "nonsense", "--text", text, "--plot", first],
    ))  # fmt: skip
    return [[*command, *(["--overwrite"] if rng.random() < 0.5 else [])]]


CAMPAIGNS: dict[str, Make] = {made.__name__: made for made in (gguf, folder, template, pack, plan, suite, server, outputs)}
