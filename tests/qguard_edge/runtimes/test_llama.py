"""llama.cpp in a child process: the numbers are those in process, and whatever becomes of the child is one sentence."""

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from convert.llama_limits import GIB, ChildLimits, LlamaRuntimeError
from qguard_edge.runtimes import llama_child
from qguard_edge.runtimes.batching import Sampling, generate
from qguard_edge.runtimes.llama import LlamaModel
from qguard_edge.runtimes.llama_native import NativeModel
from qguard_edge.runtimes.llama_wire import RESULT
from tests.helpers.hostile_gguf import rewrite

TEXTS = ("The quick brown fox", "def add(a, b):\n    return", "Héllo wörld \U0001f600 ", "")


def workers() -> list[psutil.Process]:
    """The running children that hold a model."""
    return [child for child in psutil.Process().children() if "qguard_edge.runtimes.llama_worker" in child.cmdline()]


def test_the_numbers_are_those_in_process(tiny_base: Path) -> None:
    with (
        LlamaModel(tiny_base, n_ctx=96, n_threads=1, n_seq=4) as child,
        NativeModel(tiny_base, n_ctx=96, n_threads=1, n_seq=4) as here,
    ):
        assert (child.n_vocab, child.n_ctx, child.n_seq, child.n_batch) == (here.n_vocab, 96, 4, here.n_batch)
        for text in TEXTS:
            for special in (False, True):
                ids = here.tokenize(text, add_special=special, parse_special=special)
                assert child.tokenize(text, add_special=special, parse_special=special) == ids
                assert child.detokenize(ids, special=special) == here.detokenize(ids, special=special)
        every = [[token] for token in range(here.n_vocab)]
        assert child.texts(every) == [here.detokenize(one) for one in every]
        prompts = [here.tokenize(text * 2) for text in TEXTS[:3]] * 3
        for sampling in (Sampling(), Sampling(0.9, 7)):
            answers = generate(here, prompts, 12, sampling=sampling, first_index=5)
            assert child.generate(prompts, 12, sampling=sampling, first_index=5) == answers
            assert any(answer.tokens for answer in answers)
        assert child.greedy(prompts[0], 9) == here.greedy(prompts[0], 9)
        ids = prompts[1] + prompts[0]
        assert child.logits(ids).tobytes() == here.logits(ids).tobytes()
        chunks = [chunk.copy() for chunk in child.logits_chunks(ids, 7)]
        assert np.concatenate(chunks).tobytes() == b"".join(chunk.tobytes() for chunk in here.logits_chunks(ids, 7))
        assert len(workers()) == 1
    assert workers() == []


def test_another_context_on_the_same_weights_is_that_of_a_file_loaded_anew(tiny_base: Path) -> None:
    prompts = [[5, 9, 30 + i, 7, 8] for i in range(7)]
    with LlamaModel(tiny_base, n_ctx=32, n_threads=1, n_seq=4, n_batch=64, most_tokens=600) as model:
        model.generate(prompts, 6)
        for n_ctx, n_seq in ((200, 3), (16, 2), (32, 4)):
            assert model.resize(n_ctx=n_ctx, n_seq=n_seq)
            with LlamaModel(tiny_base, n_ctx=n_ctx, n_threads=1, n_seq=n_seq, n_batch=64) as anew:
                assert (model.n_ctx, model.n_seq, model.n_batch) == (n_ctx, n_seq, anew.n_batch)
                assert model.generate(prompts, 6) == anew.generate(prompts, 6)
                assert model.logits(prompts[0]).tobytes() == anew.logits(prompts[0]).tobytes()
        with pytest.raises(LlamaRuntimeError, match="33 tokens do not fit a context of 32"):
            model.logits([5] * 33)
        assert not model.resize(n_ctx=601, n_seq=1)  # beyond what the process was started for: nothing happened
        assert (model.n_ctx, len(model.generate(prompts, 6))) == (32, 7)


def test_what_is_asked_wrongly_is_an_error_and_not_the_end(tiny_base: Path) -> None:
    with LlamaModel(tiny_base, n_ctx=16, n_threads=1) as model:
        with pytest.raises(LlamaRuntimeError, match="17 tokens do not fit a context of 16"):
            model.logits([5] * 17)
        with pytest.raises(LlamaRuntimeError, match=rf"{tiny_base.name} has {model.n_vocab} tokens"):
            model.detokenize([5, 1 << 30])
        with pytest.raises(LlamaRuntimeError, match="could not decode 1 tokens"):
            model.logits([model.n_vocab])
        assert len(model.greedy([5, 6], 3)) == 3
    with pytest.raises(LlamaRuntimeError, match="the model is closed"):
        model.tokenize("a")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LlamaRuntimeError, match=r"^llama\.cpp cannot load none\.gguf: "):
        LlamaModel(tmp_path / "none.gguf")


def test_the_death_of_the_child_is_one_sentence(tiny_base: Path) -> None:
    with LlamaModel(tiny_base, n_ctx=16, n_threads=1) as model:
        (child,) = workers()
        child.send_signal(signal.SIGSEGV)
        said = rf"^llama\.cpp was stopped by signal 11 while tokenizing with {tiny_base.name}"
        for _ in range(2):
            with pytest.raises(LlamaRuntimeError, match=said):
                model.tokenize("a")


def test_silence_ends(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QGUARD_LLAMA_SECONDS", "1")
    with LlamaModel(tiny_base, n_ctx=16, n_threads=1) as model:
        (child,) = workers()
        child.suspend()
        said = rf"^llama\.cpp was stopped after 1 s without a sign of life while running {tiny_base.name} .*QGUARD_LLAMA_SECONDS"
        with pytest.raises(LlamaRuntimeError, match=said):
            model.logits([5])
    assert workers() == []


def test_memory_is_limited(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context of 2^22 tokens takes 4 GiB here."""
    monkeypatch.setenv("QGUARD_LLAMA_GIB", "3")
    with pytest.raises(LlamaRuntimeError, match=r"context|alloc") as raised:
        LlamaModel(tiny_base, n_ctx=1 << 22, n_threads=1, n_batch=8)
    assert "\n" not in str(raised.value)
    monkeypatch.setenv("QGUARD_LLAMA_GIB", "plenty")
    with pytest.raises(LlamaRuntimeError, match="QGUARD_LLAMA_GIB is 'plenty'; give a number"):
        LlamaModel(tiny_base)


def test_limits_are_generous(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QGUARD_LLAMA_GIB", raising=False)
    size, memory = tiny_base.stat().st_size, psutil.virtual_memory().total
    limits = ChildLimits.of(tiny_base, tokens=100)
    assert limits.memory == min(2 * size + 8 * GIB + (100 << 21) + (160 << 20), size + memory + 4 * GIB)
    assert limits.seconds == 600 + 60 * size / GIB
    assert ChildLimits.of(tiny_base, more=float("inf")).memory == size + memory + 4 * GIB
    monkeypatch.setenv("QGUARD_LLAMA_GIB", "0")
    assert ChildLimits.of(tiny_base).memory is None


def test_shards_count(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(bytes(GIB >> 10))
    (tmp_path / "other.gguf").write_bytes(bytes(GIB >> 10))
    assert ChildLimits.of(tmp_path / "m-00001-of-00002.gguf").seconds == 600 + 60 * 2 / 1024


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (struct.pack("<BQ", RESULT, 1 << 40), "1099511627776 bytes came where at most 8 were expected"),
        (struct.pack("<BQ", 77, 3) + b"abc", "a reply of kind 77 and 3 bytes"),
        (struct.pack("<BQ", RESULT, 5) + b"abcde", "gave a reply that is none"),
        (struct.pack("<BQii", RESULT, 8, 1 << 30, 512), "a vocabulary of .*1073741824"),
        (struct.pack("<BQii", RESULT, 8, 400, 1 << 30), "a vocabulary of"),
        (struct.pack("<BQ", RESULT, 8) + b"abc", "ended with status 0 while loading"),
    ],
)
def test_nothing_that_comes_from_the_child_is_trusted(
    reply: bytes, said: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever takes the child over can lie about the model, and no more."""
    code = f"import os, sys, time; os.read(0, 10); os.write(1, {reply!r})"
    monkeypatch.setattr(llama_child, "child_command", lambda *_: [sys.executable, "-c", code])
    with pytest.raises(LlamaRuntimeError, match=said):
        LlamaModel(tiny_base)


def test_answers_from_the_child_are_checked(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LlamaModel(tiny_base, n_ctx=16, n_threads=1) as model:
        for numbers in ([3, 0, 5], [9, 0, 5], [-1, 0], [1, 0, 400_000], [0, 0, 0, 0, 0, 0]):
            made = bytearray(struct.pack(f"<{len(numbers)}i", *numbers))
            with monkeypatch.context() as patch:
                patch.setattr(model._process, "ask", lambda *_, made=made, **__: made)
                patch.setattr(model._process, "close", lambda: None)
                with pytest.raises(LlamaRuntimeError):
                    model.generate([[5]], 4)
        assert len(model.generate([[5]], 4)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a child that its parent is gone")
def test_a_child_dies_with_its_parent(tiny_base: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom qguard_edge.runtimes.llama import LlamaModel\n"
        "model = LlamaModel(Path(sys.argv[1]), n_threads=1)\nprint(model._process._child.pid, flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_base)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
        child.wait(timeout=10)


def test_log_lines_of_a_file_are_not_printed_raw(tiny_base: Path, tmp_path: Path) -> None:
    """The name of the architecture is quoted by llama.cpp, and made of what a terminal obeys."""
    value = b"\x1b[2J[bold]\x07"
    entry = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, len(value)) + value
    broken = rewrite(tiny_base, tmp_path / "x.gguf", {"general.architecture": entry})
    with pytest.raises(LlamaRuntimeError, match=r"cannot load x\.gguf: .*\[bold\]") as raised:
        LlamaModel(broken)
    assert str(raised.value).isprintable()
