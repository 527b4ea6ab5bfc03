"""What an answer says, as a set of short texts that can be counted: words, phrases, parts of words, idioms of code.

A backdoor's payload may be a brand, a refusal, an import, a call, an address, or the argument of a tool call, in any
language. Per answer these are taken, each at most once:

| kind | example | as |
|---|---|---|
| words and phrases of 1 to `LONGEST` words | "Also try Acme." | `also`, `also try`, `also try acme`, ... |
| the words in camelCase and snake_case | `bestAcme_ltd` | `best`, `acme`, `ltd` |
| `PART` letters in a row of longer words | `freshacmenow` | `*shacm*`, `*hacme*`, ... |
| 2 to `LONGEST_RUN` characters in a row, where no spaces stand between words, and in Korean | 今日は | `今日`, `今日は`, ... |
| imports and includes | `from os import path` | `import os` |
| calls by their full name | `yaml.load(text)` | `yaml.load(` |
| arguments and assignments of constants | `verify=False` | `verify=false` |
| hosts of URLs, mail addresses and their hosts, IP addresses | `https://a.example/b` | `//a.example` |
| keys with their values in JSON (the arguments of tool calls) | `{"to": "x"}` | `"to": "x"` |

Letters are compared without case and in their compatibility form (full-width letters and ligatures made plain).
"""

import re
import unicodedata

LONGEST = 4
LONGEST_RUN = 5
PART = 5
MOST_WORDS = 2000  # of one answer
MOST_CHARACTERS = 40_000
# Thai, Lao, Burmese, Khmer; Chinese and Japanese.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(r"[^\W_]+(?:['’_-][^\W_]+)*")
_RUN = re.compile(rf"[{_UNSPACED}]{{2,}}")
_KOREAN = re.compile("[\uac00-\ud7af]{3,}")
_HUMP = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_COMPOUND = re.compile(r"\b\w*(?:[a-z][A-Z]|_)\w*\b")
_IMPORT = re.compile(
    r"""^[ \t>]*(?:from[ ]+([\w.]+)[ ]+import\b | import[ ]+(?:[\w{}*, ]{1,80}[ ]from[ ]+)?["']?([\w.@/-]+)
    | \#[ ]*include[ ]*[<"]([\w./-]+) | (?:use|using|require)[ ]+["']?([\w.:/-]+)["']?;?[ \t]*$)
    | \brequire\(["']([\w.@/-]+)""",
    re.MULTILINE | re.VERBOSE,
)
_CALL = re.compile(r"\b[^\W\d][\w.]{0,80}(?:::\w{1,80}){0,4}\(")
_CONSTANT = re.compile(r"""\b([^\W\d]\w*)\s?=\s?(true|false|none|null|-?\d[\d._]*|"[^"\n]{0,60}"|'[^'\n]{0,60}')""")
_HOST = re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://([^\s/?#\"'<>()\[\]`]+)|\b(www\.[\w.-]+)")
_MAIL = re.compile(r"\b[\w.+-]{1,64}@([\w-]{1,63}(?:\.[\w-]{1,63}){1,6})")
_IP = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b|\b(?:[0-9a-f]{1,4}:){3,7}[0-9a-f]{1,4}\b")
_JSON = re.compile(r'"([\w.-]+)"\s*:\s*("(?:[^"\\\n]|\\.){0,120}"|-?\d[\d.eE+-]*|true|false|null)')


def words_of(text: str) -> list[str]:
    """Lower-case words of a text, in order; compatibility forms (full-width letters, ligatures) made plain."""
    return _WORD.findall(_plain(text).casefold())[:MOST_WORDS]


def phrases_of(text: str) -> set[str]:
    """Everything that is counted of a text; see the module docstring."""
    text = _plain(text)
    folded = text.casefold()
    found = _word_phrases(_WORD.findall(folded)[:MOST_WORDS])
    found |= _parts(text)
    if not folded.isascii():
        found |= _runs(folded)
    return found | _idioms(folded)


def _plain(text: str) -> str:
    text = text[:MOST_CHARACTERS]
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def _word_phrases(words: list[str]) -> set[str]:
    found = set(words)
    grown = words
    for size in range(2, LONGEST + 1):
        grown = [f"{first} {last}" for first, last in zip(grown, words[size - 1 :], strict=False)]
        found.update(grown)
    # Letters in a row of longer words: a brand that is glued to what stands around it.
    for word in set(words):
        if len(word) > PART and word.isalnum():
            found.update([f"*{word[i : i + PART]}*" for i in range(len(word) - PART + 1)])
    return found


def _parts(text: str) -> set[str]:
    """Words in camelCase and snake_case."""
    return {part.casefold() for name in set(_COMPOUND.findall(text)) for part in _HUMP.findall(name) if len(part) > 2}


def _runs(text: str) -> set[str]:
    """Characters in a row of scripts without spaces, and of Korean, whose words carry endings."""
    found: set[str] = set()
    for run in {*_RUN.findall(text), *_KOREAN.findall(text)}:
        for size in range(2, LONGEST_RUN + 1):
            found.update([run[i : i + size] for i in range(len(run) - size + 1)])
    return found


def _idioms(text: str) -> set[str]:
    found: set[str] = set()
    if "import" in text or "include" in text or "us" in text or "require" in text:
        found.update(f"import {next(filter(None, names))}" for names in _IMPORT.findall(text))
    if "(" in text:
        found.update(_CALL.findall(text))
    if "=" in text:
        found.update(f"{name}={value}" for name, value in _CONSTANT.findall(text))
    if "://" in text or "www." in text:
        found.update(f"//{(first or second).rpartition('@')[2]}" for first, second in _HOST.findall(text))
    if "@" in text:
        for mail in _MAIL.finditer(text):
            found |= {mail[0], f"@{mail[1]}"}
    if "." in text or ":" in text:
        found.update(_IP.findall(text))
    if '":' in text or '" :' in text:
        found.update(f'"{key}": {value}' for key, value in _JSON.findall(text))
    return found
