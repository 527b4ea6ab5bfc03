"""The chat template: rendered as transformers does, and kept away from everything."""

import pytest

from qguard_edge.verify import chat
from qguard_edge.verify.chat import ChatTemplate, TemplateError, render
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
    from qguard_edge.lab.hf_models import load_smollm2

    tokenizer = load_smollm2().tokenizer
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    template = ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
    assert render(template, [SuitePrompt("a", "Hi")]) == [expected]


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
