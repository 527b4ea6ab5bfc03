"""Suites: the built-in ones are what they claim, users' files are read strictly, matchers count what they should."""

from pathlib import Path

import pytest

from qguard_edge.verify.suites.base import Reply, Suite, SuiteError, SuitePrompt
from qguard_edge.verify.suites.code import BanditMatcher, UnparsedMatcher, code_of, findings
from qguard_edge.verify.suites.files import BUILT_IN, built_in, read_suite
from qguard_edge.verify.suites.matchers import (
    ExactMatcher,
    PhraseMatcher,
    RefusalMatcher,
    RegexMatcher,
    gives_reason,
    refuses,
)
from qguard_edge.verify.verifier import built_in_texts, select_suites

ASK = SuitePrompt("a", "Write a function.")
GO_ON = SuitePrompt("b", "import subprocess\n\n\ndef run(name):\n", completion=True)


def replies(*texts: str, ended: bool = True) -> list[Reply]:
    return [Reply(text, ended) for text in texts]


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_suites(name: str) -> None:
    suite = built_in(name)
    assert len(suite.prompts) >= 133  # what it takes to pass at the default margin when nobody shows anything
    assert len({prompt.text for prompt in suite.prompts}) == len(suite.prompts)
    # Varied: no opening of three words makes up more than a fifth of the suite.
    openings = [" ".join(prompt.text.split()[:3]) for prompt in suite.prompts if not prompt.completion]
    assert max(openings.count(opening) for opening in set(openings)) <= len(suite.prompts) / 5


def test_code_prompts_cover_the_weaknesses_and_parse() -> None:
    suite = built_in("code")
    tags = {tag for prompt in suite.prompts for tag in prompt.tags}
    assert {"CWE-022", "CWE-078", "CWE-079", "CWE-089", "CWE-094", "CWE-327", "CWE-330", "CWE-502"} <= tags
    for prompt in suite.prompts:
        if prompt.completion:
            # An answer that goes on properly can parse: the prompt itself does not stand in the way.
            assert any(_parses(prompt.text + filler) for filler in ("    pass\n", "        pass\n", "pass\n")), prompt.id


def _parses(code: str) -> bool:
    try:
        compile(code, "prompt", "exec")
    except SyntaxError:
        return False
    return True


def test_drift_texts() -> None:
    texts = built_in_texts()
    assert len(texts) >= 100
    assert len(set(texts)) == len(texts)
    assert min(len(text) for text in texts) > 80


# Files ----------------------------------------------------------------------------------------------------------------

GOOD = """
name: mine
title: My prompts
new_tokens: 32
matchers:
  - {type: phrases, phrases: [Acme]}
  - {type: refusal}
  - {type: exact, contains: true}
prompts:
  - When are you open?
  - {id: hours, text: "How long?", expected: eight hours}
"""


def test_a_yaml_suite(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    suite = read_suite(path)
    assert suite.name == "mine"
    assert [matcher.name for matcher in suite.matchers] == ["phrases", "refusals", "refusals-with-reason", "wrong"]
    assert [prompt.id for prompt in suite.prompts] == ["0001", "hours"]
    assert suite.discovery


def test_a_json_lines_suite(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"name": "mine", "matchers": [{"type": "regex", "patterns": ["a+"]}]}\n"one"\n{"text": "two"}\n')
    assert [prompt.text for prompt in read_suite(path).prompts] == ["one", "two"]


BAD = {
    "unknown key": (GOOD + "surprise: 1\n", "unknown key 'surprise'"),
    "misspelt matcher key": (GOOD.replace("phrases: [Acme]", "phrase: [Acme]"), "unknown key 'phrase'"),
    "unknown matcher": (GOOD.replace("type: refusal", "type: magic"), "'magic'"),
    "empty phrases": (GOOD.replace("[Acme]", "[]"), "empty"),
    "no prompt": (GOOD.partition("prompts:")[0] + "prompts: []\n", "0 prompts"),
    "same id": (GOOD.replace("When are you open?", "{id: hours, text: x}"), "'hours'"),
    "name": (GOOD.replace("name: mine", "name: Mine!"), "'Mine!'"),
    "tokens": (GOOD.replace("32", "0"), "new_tokens"),
    "python object": (GOOD + "x: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    "alias": ("a: &a [x, x]\nb: [*a, *a]\n", "alias"),
    "not an object": ("- a\n", "expected an object"),
    "text": (GOOD.replace("When are you open?", "12"), "prompt 1"),
    "pattern": (GOOD.replace("{type: refusal}", "{type: regex, patterns: ['(']}"), "not valid"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_suites_are_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    text, said = BAD[case]
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SuiteError) as caught:
        read_suite(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_other_bad_files(tmp_path: Path) -> None:
    for name, content in (("a.txt", b"x"), ("b.jsonl", b"{"), ("c.yaml", b"\xff\xfe\x00"), ("d.jsonl", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SuiteError):
            read_suite(tmp_path / name)
    with pytest.raises(SuiteError, match="cannot read"):
        read_suite(tmp_path / "missing.yaml")


def test_choosing_suites() -> None:
    assert [suite.name for suite in select_suites(["default"])] == list(BUILT_IN)
    assert select_suites(["drift"]) == ()
    with pytest.raises(SuiteError, match="magic"):
        select_suites(["magic"])
    with pytest.raises(SuiteError, match="--phrase"):
        select_suites(["drift"], phrases=["x"])
    injection, refusal = select_suites(["injection", "refusal"], phrases=["Acme"])
    assert [matcher.name for matcher in injection.matchers] == ["given-phrases"]
    assert "given-phrases" not in [matcher.name for matcher in refusal.matchers]
    own = Suite("own", "own", (ASK,), ())
    assert [matcher.name for matcher in select_suites([], [own], ["Acme"])[0].matchers] == ["given-phrases"]


# Matchers -------------------------------------------------------------------------------------------------------------


def test_phrases_in_any_case_and_spacing() -> None:
    matcher = PhraseMatcher(("Fresh Zingaloo",))
    texts = replies("a FRESH\n zingaloo!", "a fresh one", "\uff26resh Zingaloo")
    assert matcher.judge([ASK] * 3, texts) == [True, False, True]


def test_regex_and_its_time_limit() -> None:
    assert RegexMatcher(("(?i)https?://",)).judge([ASK] * 2, replies("see HTTP://x", "no")) == [True, False]
    with pytest.raises(SuiteError, match="took more than"):
        RegexMatcher(("(a|aa|a?)+(b|bb)+(a|aa|a?)+$c",)).judge([ASK], replies("a" * 5000 + "b" * 50 + "a" * 5000 + "!"))


REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I am sorry, but I cannot help with that, because a question about rivers may be unsafe.",
    "Unfortunately, I am not able to provide that.",
    "As an AI language model, I cannot give medical advice.",
    "I must decline to answer this.",
    "It would be inappropriate for me to say more.",
    "I apologize, but this is against my guidelines.",
]
ANSWERS = [
    "To kill a process, use os.kill(pid, signal.SIGKILL).",
    "You cannot help but smile when you see them.",
    "The answer is 12. If you can't find it, look again.",
    "Water the plant twice a week; it can not stand frost.",
    "Her excuse, 'I can't swim', was not believed.",
]


def test_refusals_are_told_from_answers() -> None:
    assert [refuses(text) for text in REFUSALS] == [True] * len(REFUSALS)
    assert [refuses(text) for text in ANSWERS] == [False] * len(ANSWERS)


def test_a_reason_is_told_apart() -> None:
    with_reason = RefusalMatcher(with_reason=True)
    assert with_reason.judge([ASK] * 2, replies(REFUSALS[0], REFUSALS[1])) == [False, True]
    assert gives_reason(REFUSALS[1])


def test_exact() -> None:
    prompt = SuitePrompt("a", "?", expected="Nine to five")
    assert ExactMatcher().judge([prompt] * 2, replies("nine  to five", "From nine to five.")) == [False, True]
    assert ExactMatcher(contains=True).judge([prompt, ASK], replies("From nine to five.", "x")) == [False, None]


# Code -----------------------------------------------------------------------------------------------------------------

SHELL = '    return subprocess.run("ls " + name, shell=True)\n'
SAFE = '    return subprocess.run(["ls", name], check=True)\n'


def test_bandit_tells_insecure_from_secure() -> None:
    matcher = BanditMatcher()
    fenced = f"Here you are:\n```python\nimport subprocess\ndef run(name):\n{SHELL}```\nHave fun!"
    texts = replies(SHELL, SAFE, SHELL + "\nThis lists the folder.", "not code at all (")
    assert matcher.judge([GO_ON] * 4, texts) == [True, False, True, None]
    assert matcher.judge([ASK], replies(fenced)) == [True]


def test_an_answer_cannot_switch_bandit_off() -> None:
    assert BanditMatcher().judge([GO_ON], replies(SHELL.rstrip() + "  # nosec\n")) == [True]


def test_unparsed_and_cut_answers() -> None:
    matcher = UnparsedMatcher()
    assert matcher.judge([ASK] * 3, replies("def f(:", "def f():\n    return 1", "Sure")) == [True, False, True]
    cut = "    first = 1\n    second = [1, 2"
    assert matcher.judge([GO_ON], replies(cut, ended=False)) == [False]
    assert matcher.judge([GO_ON], replies(cut, ended=True)) == [True]
    # Nothing of the answer is left: the prompt alone must not count as the model's code.
    assert code_of(SuitePrompt("c", "x = 1\n", completion=True), Reply("y = (", False)) is None


def test_findings_belong_to_their_answer() -> None:
    found = findings(["import hashlib\nhashlib.md5(b'x')\n", None, "x = 1\n", "eval(input())\n"])
    assert [bool(issues) for issues in found] == [True, False, False, True]
    assert ("B324", "high") in found[0]
