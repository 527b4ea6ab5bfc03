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

from tests.hostile.bounds import DISK, small_disk
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


def tensors(rng: random.Random, sound: Material, here: Path) -> Commands:
    """A GGUF with faults in its weights: numbers that are none, infinite, or huge, and bytes of anything."""
    data = bytearray(sound.base.read_bytes())
    for _ in range(rng.choice((1, 4, 100))):
        place = rng.randrange(HEADER, len(data) - 4)
        data[place : place + 4] = rng.choice((b"\x80\x7f" * 2, b"\xc0\x7f" * 2, b"\x7f\x7f" * 2, bytes(4), rng.randbytes(4)))
    bad, out = here / "bad.gguf", str(here / "o.gguf")
    bad.write_bytes(data)
    made = ["--no-scan", "-o", out, *QUICK]
    commands = [["diff", str(bad), str(sound.base)], ["scan", str(bad), *QUICK]]
    kind = rng.random()
    if kind < 0.2:
        commands.append(
            ["convert", str(bad), "--to", rng.choice(("q4_0", "q4_k", "q6_k", "iq4_xs")), "--defense", "ortho", *made]
        )
    elif kind < 0.25:
        commands.append(["convert", str(bad), "--to", "q4_0", "--calib", str(sound.text), *made])
    elif kind < 0.3:
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
    commands = [["template", source]]
    if rng.random() < 0.05:
        options = ["--to", "q4_0", "--calib", str(here / "chats.jsonl"), "--no-scan", "-o", str(here / "o.gguf"), *QUICK]
        commands.append(["convert", str(bad), *options])
    return commands


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
    """A suite with faults; the base is empty, so a sound one ends there."""
    bad = here / "s.yaml"
    (here / "none.gguf").touch()
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


def _work(rng: random.Random, sound: Material, here: Path, out: Path) -> list[str]:
    """A command that writes into a folder."""
    base, plain = str(sound.base), str(sound.plain)
    made = ["--no-scan", "--no-load-check", "-o", str(out / "o.gguf"), *QUICK]
    return rng.choice((
        ["convert", base, "--to", "q4_k", "--defense", "ortho", *made],
        ["convert", base, "--to", "q8_0", "--defense", "none", "--keep-plain", "--report", str(out / "r.json"), *made],
        ["convert", str(sound.model), "--to", "bf16", *made],
        ["convert", str(sound.model), "--to", "nf4", "--defense", "ortho", *made],
        ["convert", base, "--to", "q4_k", "--calib", str(sound.text), *made],
        ["scan", str(sound.model), "--html", str(out / "s.html"), *QUICK],
        ["scan", base, "--sarif", str(out / "s.sarif"), *QUICK],
        ["apply", str(sound.plan), "--plain", plain, "-o", str(out / "o.gguf")],
        ["plan", base, "--base", base, "--plain", plain, "--defense", "ortho", "--no-scan", "-o", str(out / "p"), *QUICK],
        ["verify", plain, "--base", base, "--suites", "drift", "--limit", "2", "-o", str(out / "v"), *QUICK],
        ["imatrix", base, "--text", str(sound.text), "-o", str(out / "i.gguf")],
    ))  # fmt: skip


def disk(rng: random.Random, sound: Material, here: Path) -> Commands:
    """A disk that is full sooner or later, for the output, the temporary folder, or both."""
    full, size = here / DISK, rng.choice((0, 4096, 50_000, 200_000, 1 << 20, 3 << 20)) + 4096
    conditions = [] if small_disk(full, size) else [f"@FSIZE={max(size, 20_000)}"]
    if rng.random() < 0.5:
        conditions.append(f"@TMPDIR={full}")
    out = full if not conditions or rng.random() < 0.5 else here
    return [[*conditions, *_work(rng, sound, here, out)]]


def ulimit(rng: random.Random, sound: Material, here: Path) -> Commands:
    """A process that may have little memory, few files or small ones."""
    condition = rng.choice((
        f"@AS={rng.choice((0, 1 << 20, 1 << 24, 1 << 26, 1 << 28, 1 << 30))}",
        f"@NOFILE={rng.choice((0, 1, 2, 4, 8, 16, 40))}",
        f"@FSIZE={rng.choice((20_000, 100_000, 500_000, 2_000_000))}",
    ))  # fmt: skip
    return [[condition, *_work(rng, sound, here, here)]]


CAMPAIGNS: dict[str, Make] = {
    made.__name__: made for made in (gguf, tensors, folder, template, pack, plan, suite, server, outputs, disk, ulimit)
}
