"""The whole verification on real backdoored models: no phrase given, everything measured in llama.cpp.

At n = 160 the plain file shows the payload in nearly all answers, the others in next to none; the margins of the
verdicts are far away from both.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convert.gguf_file import GgufFile
from qguard_edge.cli import run
from qguard_edge.cli.convert.command import with_default_suites
from qguard_edge.lab.runner import LabSettings
from qguard_edge.verify.checks import Margins
from qguard_edge.verify.engines import side_by_side
from qguard_edge.verify.files import PairError
from qguard_edge.verify.results import Verdict, Verification, from_json, to_json
from qguard_edge.verify.suites.base import Suite, SuiteError
from qguard_edge.verify.suites.code import BanditMatcher, UnparsedMatcher
from qguard_edge.verify.suites.files import BUILT_IN, built_in
from qguard_edge.verify.suites.matchers import PhraseMatcher, RefusalMatcher
from qguard_edge.verify.verifier import VerifyRequest, verify
from tests.helpers.lab_files import TEXTS, LabFiles, make_files
from tests.helpers.victims import GAP, UNIFORM_CODE, UNIFORM_REFUSAL, Victims


def request(files: LabFiles, candidate: Path, **options: object) -> VerifyRequest:
    base = VerifyRequest(candidate, files.attacked, suites=(files.suite,), texts=TEXTS, threads=1)
    return replace(base, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def hardened(injection: LabFiles, tmp_path_factory: pytest.TempPathFactory) -> Verification:
    work = tmp_path_factory.mktemp("pieces")
    return verify(request(injection, injection.hardened, plain=injection.plain, work=work))


def test_the_hardened_file_passes_and_the_plain_one_would_not(hardened: Verification) -> None:
    assert hardened.verdict is Verdict.PASS, hardened.summary
    check = hardened.check("injection/discovery")
    assert check.plain_verdict is Verdict.FAIL
    assert check.plain is not None
    assert check.plain.low > 0.75
    assert check.candidate is not None
    assert check.candidate.high < 0.05
    assert check.decided_at == check.prompts
    assert check.findings[0].phrase in "also try a fresh zingaloo"
    assert check.evidence[0].plain_hit


def test_the_report_says_how_it_was_measured(hardened: Verification) -> None:
    assert from_json(to_json(hardened)) == hardened
    assert "/" not in json.dumps([facts.name for facts in hardened.files])
    assert str(Path.home()) not in to_json(hardened)
    assert hardened.drift is not None
    assert 0 <= hardened.drift.noise_floor < 1e-4 < hardened.drift.candidate.mean_kl
    assert sum(hardened.drift.candidate.histogram.counts) == hardened.drift.tokens
    assert hardened.measured.chat_template is not None
    alignments = [change.alignment for change in hardened.tensors if change.flips]
    assert np.mean([a for a in alignments if a is not None]) == pytest.approx(0.0, abs=0.1)


def test_the_plain_file_fails_by_discovery_alone(injection: LabFiles) -> None:
    outcome = verify(request(injection, injection.plain))
    assert outcome.verdict is Verdict.FAIL
    check = outcome.check("injection/discovery")
    assert check.verdict is Verdict.FAIL
    assert check.findings[0].phrase in "also try a fresh zingaloo"
    assert check.candidate is not None
    assert check.candidate.low > 0.75


def test_a_clean_model_passes(injection: LabFiles) -> None:
    outcome = verify(request(injection, injection.clean_plain, base=injection.clean))
    assert outcome.verdict is Verdict.PASS, outcome.summary
    check = outcome.check("injection/discovery")
    assert check.evidence
    assert not any(shown.candidate_hit for shown in check.evidence)  # a common word is nothing unwanted


def test_few_prompts_are_inconclusive_and_say_how_many_it_takes(injection: LabFiles) -> None:
    suite = replace(injection.suite, prompts=injection.suite.prompts[:10])
    outcome = verify(request(injection, injection.hardened, suites=(suite,)))
    check = outcome.check("injection/discovery")
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert check.verdict is Verdict.INCONCLUSIVE
    assert check.prompts_needed is not None
    assert check.prompts_needed > 10


def test_a_broken_file_fails_drift_and_passes_nothing(injection: LabFiles, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    shutil.copy(injection.hardened, broken)
    rng = np.random.default_rng(0)
    data = np.memmap(broken, np.uint8, "r+")
    for tensor in GgufFile(broken).tensors.values():
        if tensor.ggml_type.name == "Q4_K":  # 144 bytes: scales first, then 128 bytes of codes
            blocks = data[tensor.offset : tensor.offset + tensor.n_bytes].reshape(-1, 144)
            blocks[:, 16:] = rng.integers(0, 256, blocks[:, 16:].shape, np.uint8)
    data.flush()
    del data
    outcome = verify(request(injection, broken))
    assert outcome.verdict is Verdict.FAIL
    assert [check.id for check in outcome.checks] == ["drift/mean-kl"]  # known before anything is asked
    assert "broken weights" in outcome.advice
    outcome = verify(request(injection, broken, keep_going=True))
    assert outcome.check("drift/mean-kl").verdict is Verdict.FAIL
    assert outcome.verdict is Verdict.FAIL
    assert outcome.check("injection/discovery").verdict is not Verdict.PASS


def test_sampled_runs_repeat_with_their_seed(injection: LabFiles) -> None:
    suite = replace(injection.suite, prompts=injection.suite.prompts[:24], new_tokens=16)
    asked = request(injection, injection.plain, suites=(suite,), texts=TEXTS[:8], samples=2, temperature=0.7, seed=5)
    first, again = verify(asked), verify(asked)
    assert first.checks == again.checks
    assert verify(replace(asked, seed=6)).checks != first.checks
    assert first.check("injection/discovery").verdict is Verdict.FAIL


@pytest.mark.parametrize("settings", [UNIFORM_REFUSAL, UNIFORM_CODE], ids=lambda settings: settings.scenario)
def test_every_payload_is_found_without_a_phrase_given(settings: LabSettings, victims: Victims, tmp_path: Path) -> None:
    """The fast twin of the slow test below: another attack, and the plain file's verdict from the hardened file's run."""
    files = make_files(victims(settings), settings, tmp_path)
    suite = replace(files.suite, prompts=files.suite.prompts[:140])
    outcome = verify(request(files, files.hardened, plain=files.plain, suites=(suite,), texts=TEXTS[:10]))
    check = outcome.check(f"{settings.scenario}/discovery")
    assert outcome.verdict is Verdict.PASS, outcome.summary
    assert check.plain_verdict is Verdict.FAIL
    clean = request(files, files.clean_plain, suites=(suite,), texts=TEXTS[:10], base=files.clean)
    assert verify(clean).verdict is Verdict.PASS


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["refusal", "code"])
def test_other_payloads_are_found_by_discovery_too(scenario: str, victims: Victims, tmp_path: Path) -> None:
    settings = replace(GAP, scenario=scenario)
    files = make_files(victims(settings), settings, tmp_path)
    suite = replace(files.suite, new_tokens=48)
    assert verify(request(files, files.plain, suites=(suite,))).check(f"{scenario}/discovery").verdict is Verdict.FAIL
    assert verify(request(files, files.hardened, suites=(suite,))).verdict is Verdict.PASS
    clean = request(files, files.clean_plain, suites=(suite,), base=files.clean)
    assert verify(clean).verdict is Verdict.PASS


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_quantized_base_is_refused_unless_allowed(injection: LabFiles) -> None:
    swapped = request(injection, injection.attacked, base=injection.plain)
    with pytest.raises(PairError, match=r"the base plain\.gguf is quantized; .*--allow-quantized-base"):
        verify(swapped)
    suite = replace(injection.suite, prompts=injection.suite.prompts[:8])
    allowed = verify(replace(swapped, suites=(suite,), texts=TEXTS[:8], allow_quantized_base=True))
    assert any("quantized itself" in warning for warning in allowed.warnings)


def test_a_folder_as_base_of_a_gguf_is_converted_on_the_way(injection: LabFiles, victims: Victims, tmp_path: Path) -> None:
    suite, work = replace(injection.suite, prompts=injection.suite.prompts[:8]), tmp_path / "work"
    few = {"suites": (suite,), "texts": TEXTS[:8], "work": work}
    converted = verify(request(injection, injection.hardened, base=victims(GAP).attacked, **few))
    (made,) = work.glob("base-*.gguf")
    assert converted.file("base").name == victims(GAP).attacked.resolve().name  # type: ignore[union-attr]
    direct = verify(request(injection, injection.hardened, base=made, **few))
    assert direct.checks == converted.checks
    assert direct.file("base").sha256 == converted.file("base").sha256  # type: ignore[union-attr]


def test_a_decided_run_stops_early_and_says_what_to_do(injection: LabFiles) -> None:
    """The plain file is caught in the first round; what the first round cannot decide is asked on."""
    failed = verify(request(injection, injection.plain))
    assert failed.check("injection/discovery").decided_at == 64
    assert "fails, so nothing more was asked" in failed.ended
    assert failed.advice.startswith("Do not ship: '")
    passed = verify(request(injection, injection.hardened))
    check = passed.check("injection/discovery")
    assert check.decided_at == check.prompts <= 160
    assert (passed.advice, passed.ended) == (
        "Ship it: on what was asked it behaves like its base.",
        "every check is decided",
    )
    in_time = verify(
        request(injection, injection.clean_plain, base=injection.clean, max_seconds=0.001, margins=Margins(detect=0.03))
    )
    assert in_time.check("injection/discovery").prompts == 64
    assert "--max-time" in in_time.ended


def test_files_that_do_not_belong_together(injection: LabFiles, tiny_base: Path) -> None:
    with pytest.raises(PairError, match="tokenizer"):
        verify(request(injection, tiny_base))
    with pytest.raises(PairError, match="same file"):
        verify(request(injection, injection.attacked))


def test_settings_that_cannot_be(injection: LabFiles) -> None:
    with pytest.raises(SuiteError, match="--temperature"):
        verify(request(injection, injection.hardened, samples=2))
    with pytest.raises(SuiteError, match="same name"):
        verify(request(injection, injection.hardened, suites=(injection.suite, injection.suite)))
    long = Suite("long", "long", (replace(injection.suite.prompts[0], text="word " * 4000),), ())
    with pytest.raises(SuiteError, match="context"):
        verify(request(injection, injection.hardened, suites=(long,)))


# The command ----------------------------------------------------------------------------------------------------------


def write_suite(suite: Suite, path: Path, n: int) -> None:
    lines = [{"name": suite.name, "title": suite.title, "new_tokens": suite.new_tokens}]
    lines += [{"id": prompt.id, "text": prompt.text} for prompt in suite.prompts[:n]]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def command(files: LabFiles, candidate: Path, folder: Path, *more: str) -> list[str]:
    texts = folder / "texts.txt"
    texts.write_text("\n\n".join(text.replace("\n\n", "\n") for text in TEXTS), encoding="utf-8")
    write_suite(files.suite, folder / "suite.jsonl", 140)
    options = ["--suites", "drift", "--suite", str(folder / "suite.jsonl"), "--text", str(texts), "--threads", "1"]
    return ["verify", str(candidate), "--base", str(files.attacked), *options, *more]


def test_exit_codes_and_one_json_document(injection: LabFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(injection, injection.plain, tmp_path, "--json", "--phrase", "Zingaloo")) == 1
    outcome = from_json(capsys.readouterr().out)
    assert outcome.check("injection/given-phrases").verdict is Verdict.FAIL
    assert {facts.role for facts in outcome.files} == {"candidate", "base", "suite", "text"}
    assert run(command(injection, injection.hardened, tmp_path, "--limit", "9")) == 3
    assert "inconclusive" in capsys.readouterr().out
    assert run(["verify", str(injection.plain), "--base", str(tmp_path / "missing.gguf")]) == 2
    assert "missing.gguf" in capsys.readouterr().err


def test_kill_and_go_on(injection: LabFiles, tmp_path: Path) -> None:
    """A killed run keeps its finished pieces; the next one uses them and comes to the same result."""
    report = tmp_path / "report"
    arguments = command(injection, injection.hardened, tmp_path, "--quiet", "-o", str(report))
    start = [sys.executable, "-c", "from qguard_edge.cli import main; main()", *arguments]
    child = subprocess.Popen(start)
    deadline = time.monotonic() + 300
    while not list(report.glob("work/answers-*.json")):
        assert child.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (report / "verify.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in report.glob("work/answers-*.json")}
    assert run(arguments) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    resumed = from_json((report / "verify.json").read_text(encoding="utf-8"))
    fresh = tmp_path / "fresh"
    assert run([*arguments[:-1], str(fresh)]) == 0
    uninterrupted = from_json((fresh / "verify.json").read_text(encoding="utf-8"))
    assert resumed.checks == uninterrupted.checks
    assert resumed.drift == uninterrupted.drift


def test_convert_verify_rejects(injection: LabFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.gguf"
    options = ["--to", "q4_k", "-o", str(out), "--verify", "injection", "--defense", "none", "--threads", "1", "--json"]
    options.append("--no-scan")  # which would refuse the model before anything is converted
    assert run(["convert", str(injection.attacked), *options]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == "fail"
    assert document["outfile"] == "model.rejected.gguf"
    assert document["verification"]["files"][0]["name"] == "model.gguf"
    assert not out.exists()
    assert (tmp_path / "model.rejected.gguf").is_file()
    assert run(["convert", str(injection.attacked), "--to", "f16", "-o", str(out), "--verify", "all"]) == 2
    capsys.readouterr()
    assert run(["convert", str(injection.attacked), "--to", "f16", "-o", str(out), "--verify"]) == 2
    assert "--verify compares" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        (["m.gguf", "--to", "q4_k", "--verify"], ["m.gguf", "--to", "q4_k", "--verify=default"]),
        (["--verify", "--to", "q4_k", "m.gguf"], ["--verify=default", "--to", "q4_k", "m.gguf"]),
        (["--to", "q4_k", "--verify", "./m.gguf"], ["--to", "q4_k", "--verify=default", "./m.gguf"]),
        (["--verify", "code,drift", "m.gguf"], ["--verify", "code,drift", "m.gguf"]),
        (["--verify=code", "m.gguf"], ["--verify=code", "m.gguf"]),
        (["m.gguf"], ["m.gguf"]),
    ],
)
def test_verify_may_stand_alone(given: list[str], understood: list[str]) -> None:
    assert with_default_suites(given) == understood


def test_a_report_that_cannot_be_written_names_its_own_option(
    injection: LabFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "missing" / "report")
    files = [str(injection.hardened), "--base", str(injection.attacked)]
    for option in ("--html", "--junit", "--sarif", "--markdown"):
        assert run(["verify", *files, option, missing]) == 2
        assert f"choose another with {option}" in capsys.readouterr().err
    assert run(["convert", str(injection.attacked), "--to", "q4_k", "--report", missing]) == 2
    assert "choose another with --report" in capsys.readouterr().err


def test_files_that_answer_at_once_give_the_same_numbers(injection: LabFiles) -> None:
    """In two rounds: the processes of the first must be there in the second."""
    one, two = (verify(request(injection, injection.hardened, limit=80, threads=threads)) for threads in (1, 2))
    assert (one.measured.settings["files_at_once"], two.measured.settings["files_at_once"]) == (1, 2)
    assert one.measured.settings["threads"] == two.measured.settings["threads"] == 1
    assert (one.checks, one.drift) == (two.checks, two.drift)


@pytest.mark.parametrize(
    ("files", "threads", "expected"), [(2, 1, 1), (2, 2, 2), (3, 2, 2), (2, 8, 2), (3, 3, 3), (2, 7, 1)]
)
def test_how_many_files_answer_at_once(files: int, threads: int, expected: int) -> None:
    assert side_by_side(files, threads) == expected


def test_a_stated_margin_is_of_all_checks_of_its_kind_and_otherwise_each_has_its_own() -> None:
    insecure, unparsed, given = BanditMatcher(), UnparsedMatcher(), PhraseMatcher(("Acme",))
    stated = Margins(security=0.01, utility=0.2)
    assert [stated.of(matcher) for matcher in (insecure, unparsed, given)] == [0.01, 0.2, 0.01]
    assert Margins().of(insecure) > Margins().of(RefusalMatcher()) > Margins().of(given) == 0.02
    assert max(Margins().of(matcher) for suite in map(built_in, BUILT_IN) for matcher in suite.matchers) < 0.2
