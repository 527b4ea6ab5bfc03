"""The model's own chat template, rendered once, away from everything.

A template is a program that came with a model file, so it is hostile input: it runs in Jinja2's immutable sandbox (no attribute
that leads to Python's insides, ranges limited) in a child process with limits on time and memory. What comes back is
text. It is rendered from the *base's* template for all files, and turned into token ids once, so that every file
gets the same ids; `strftime_now` always answers with the same day, so that a prompt does not depend on the date.

Run as `python -m qguard_edge.verify.chat`: reads one JSON object on standard input, writes one on standard output.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from convert.child import child_command, limit_process
from convert.gguf_file import GgufFile
from qguard_edge.verify.suites.base import SuitePrompt
from quant_grids.errors import QGuardError

SECONDS = 120
MEMORY = 4 << 30
LONGEST_TEMPLATE = 1 << 20
LONGEST_TEXT = 1 << 20
_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
"""A tag of transformers around what the assistant says: it marks the place, and changes nothing of the text."""
DAY = datetime(2025, 1, 1)  # what `strftime_now` says


class TemplateError(QGuardError):
    """The model's chat template cannot be rendered."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template with the texts it may use.

    Attributes:
        source: Jinja2.
        bos: text of the model's begin-of-sequence token, or empty.
        eos: text of its end-of-sequence token, or empty.
    """

    source: str
    bos: str
    eos: str


def template_of(file: GgufFile) -> ChatTemplate | None:
    """The chat template of a GGUF; None when it has none.

    Raises:
        TemplateError: it is not a text, or absurdly long.
    """
    source = file.get("tokenizer.chat_template")
    if source is None:
        return None
    if not isinstance(source, str) or len(source) > LONGEST_TEMPLATE:
        raise TemplateError(f"{file.path.name}: its chat template is not a text of at most {LONGEST_TEMPLATE} characters")
    tokens = file.get("tokenizer.ggml.tokens", [])

    def text_of(key: str) -> str:
        number = file.get(f"tokenizer.ggml.{key}_token_id")
        return str(tokens[number]) if isinstance(number, int) and 0 <= number < len(tokens) else ""

    return ChatTemplate(source, text_of("bos"), text_of("eos"))


def render(template: ChatTemplate, prompts: Sequence[SuitePrompt]) -> list[str]:
    """Text of every prompt, up to where the answer begins.

    Raises:
        TemplateError: the template is invalid, refuses a conversation, takes too long or needs too much memory.
    """
    return render_conversations(
        template,
        [
            ((("system", prompt.system),) if prompt.system else ()) + prompt.turns + (("user", prompt.text),)
            for prompt in prompts
        ],
        ask=True,
        tools=[prompt.tools for prompt in prompts],
    )


def takes_tools(template: ChatTemplate) -> bool:
    """Whether a template shows the model the tools it may call: its text is another one with a tool than without."""
    probe = {
        "name": "probe_weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {}},
    }
    asked = SuitePrompt("probe", "How is the weather?")
    with_tool = replace(asked, tools=(json.dumps({"type": "function", "function": probe}),))
    try:
        without, shown = render(template, [asked, with_tool])
    except TemplateError:
        render(template, [asked])  # a template that refuses everything is an error; one that refuses tools has none
        return False
    return shown != without and "probe_weather" in shown


def render_conversations(
    template: ChatTemplate,
    conversations: Sequence[Sequence[tuple[str, str]]],
    *,
    ask: bool = False,
    tools: Sequence[Sequence[str]] | None = None,
) -> list[str]:
    """Text of every conversation, in one child process.

    Args:
        template: of the model.
        conversations: (role, content) pairs of each.
        ask: end where the assistant's next answer begins.
        tools: what each may call, as JSON objects; None: no conversation may call anything.

    Raises:
        TemplateError: the template is invalid, refuses a conversation, takes too long or wants too much memory.
    """
    messages = [[{"role": role, "content": content} for role, content in turns] for turns in conversations]
    request = {
        "source": template.source,
        "bos": template.bos,
        "eos": template.eos,
        "conversations": messages,
        "ask": ask,
        "tools": [[json.loads(tool) for tool in given] or None for given in tools or [()] * len(messages)],
    }
    try:
        done = subprocess.run(
            child_command("qguard_edge.verify.chat"),
            input=json.dumps(request),
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise TemplateError(f"the chat template took more than {SECONDS} s; it was stopped") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise TemplateError(
            f"the chat template cannot be rendered: {lines[-1][:300] if lines else 'its process was stopped'}"
        )
    texts = json.loads(done.stdout)
    return [str(text) for text in texts]


def _environment(template: ChatTemplate) -> Any:
    """Jinja2's sandbox with what chat templates expect, as transformers and llama.cpp offer it."""
    from jinja2 import TemplateError as JinjaError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message: str) -> None:
        raise JinjaError(message)

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": fail,
        "strftime_now": DAY.strftime,
        "bos_token": template.bos,
        "eos_token": template.eos,
    }
    return environment


def _as_condition(mark: re.Match[str]) -> str:
    """A `generation` tag as one that Jinja2 knows and that is always true; with its control of white space."""
    return f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}"


def main() -> int:
    """Entry point of the child process; returns the exit status."""
    from jinja2 import TemplateError as JinjaError

    limit_process(memory=MEMORY, processor_seconds=SECONDS)
    request = json.load(sys.stdin)
    template = ChatTemplate(request["source"], request["bos"], request["eos"])
    try:
        compiled = _environment(template).from_string(_GENERATION.sub(_as_condition, template.source))
        texts = []
        for messages, tools in zip(request["conversations"], request["tools"], strict=True):
            # In pieces, so that a template that writes without end is stopped before it fills the memory.
            pieces, size = [], 0
            for piece in compiled.generate(
                messages=messages, add_generation_prompt=request["ask"], tools=tools, documents=None
            ):
                pieces.append(piece)
                size += len(piece)
                if size > LONGEST_TEXT:
                    sys.stderr.write(f"it writes more than {LONGEST_TEXT} characters for one prompt\n")
                    return 1
            texts.append("".join(pieces))
    except (
        JinjaError,
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        ArithmeticError,
        OverflowError,
    ) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    except (MemoryError, RecursionError) as error:
        sys.stderr.write(f"{type(error).__name__}: it needs more memory or time than it may have\n")
        return 1
    json.dump(texts, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
