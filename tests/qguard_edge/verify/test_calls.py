"""Tool calls are read in the forms that the families' templates document."""

import pytest

from qguard_edge.verify.suites.calls import ToolCall, calls_in

KNOWN = ("get_weather", "set_timer")
PARIS = ToolCall("get_weather", {"city": "Paris", "days": 3})
TIMER = ToolCall("set_timer", {"minutes": 5})
JSON = '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}'

FORMS = {
    "Hermes, Qwen 2.5 and 3": f"<tool_call>\n{JSON}\n</tool_call>",
    "Hermes with words before": f"I will look that up.\n<tool_call>{JSON}</tool_call><|im_end|>",
    "the tag never closed": f"<tool_call>\n{JSON}",
    "bare": JSON,
    "Llama 3.1": '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}',
    "Llama 3.1 with its mark": '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}',
    "Llama 3.1, a user's function": '<function=get_weather>{"city": "Paris", "days": 3}</function>',
    "Mistral 7B v0.3": f"[TOOL_CALLS] [{JSON}]",
    "Mistral without the control token": f"[{JSON}]",
    "Mistral with an id": '[{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}, "id": "abc123456"}]',
    "Mistral Small 3": '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 3}',
    "the same without control tokens": 'get_weather{"city": "Paris", "days": 3}',
    "Granite": f"<|tool_call|>[{JSON}]",
    "Phi-4 mini": f"functools[{JSON}]",
    "Command R": 'Action: ```json\n[{"tool_name": "get_weather", "parameters": {"city": "Paris", "days": 3}}]\n```',
    "DeepSeek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Paris", "days": 3}\n```<｜tool▁call▁end｜>',
    "Qwen3 Coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>",
    "GLM": "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>",
    "gpt-oss": '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris", "days": 3}',
    "OpenAI's objects": '{"tool_calls": [{"type": "function", "function": {"name": "get_weather", '
    '"arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 3}"}}]}',
    "a fence": f"```json\n{JSON}\n```",
    "Python's quotes": "{'name': 'get_weather', 'arguments': {'city': 'Paris', 'days': 3}}",
    "Python": 'get_weather(city="Paris", days=3)',
    "Gemma": '```tool_code\nprint(get_weather(city="Paris", days=3))\n```',
    "LFM2": '<|tool_call_start|>[get_weather(city="Paris", days=3)]<|tool_call_end|>',
}


@pytest.mark.parametrize("form", FORMS)
def test_one_call(form: str) -> None:
    assert calls_in(FORMS[form], KNOWN) == (PARIS,)


TWO = {
    "Hermes": f'<tool_call>{JSON}</tool_call>\n<tool_call>{{"name": "set_timer", "arguments": {{"minutes": 5}}}}</tool_call>',
    "a list": f'[{JSON}, {{"name": "set_timer", "arguments": {{"minutes": 5}}}}]',
    "Llama, on lines": f'{JSON}; {{"name": "set_timer", "parameters": {{"minutes": 5}}}}',
    "Python": "[get_weather(city='Paris', days=3), set_timer(minutes=5)]",
    "Mistral Small 3": 'get_weather[ARGS]{"city": "Paris", "days": 3}[TOOL_CALLS]set_timer[ARGS]{"minutes": 5}',
}


@pytest.mark.parametrize("form", TWO)
def test_two_calls(form: str) -> None:
    assert calls_in(TWO[form], KNOWN) == (PARIS, TIMER)


NONE = {
    "words": "It is sunny in Paris.",
    "empty": "",
    "cut": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par',
    "an object that is no call": '{"city": "Paris", "days": 3}',
    "an unknown function": 'weather(city="Paris")',
    "no values": "get_weather(city)",
    "braces": "{{{{[[[[",
    "deep": "[" * 5000,
    "brackets": "get_weather(" * 300,
}


@pytest.mark.parametrize("form", NONE)
@pytest.mark.timeout(10)
def test_no_call(form: str) -> None:
    assert calls_in(NONE[form], KNOWN) == ()


def test_a_tool_that_was_not_offered_is_seen_where_the_form_says_it_is_a_call() -> None:
    assert calls_in('<tool_call>{"name": "send_money", "arguments": {"to": "x"}}</tool_call>', KNOWN) == (
        ToolCall("send_money", {"to": "x"}),
    )
