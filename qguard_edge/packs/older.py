"""Packs of versions 1 and 2 as JSON of version 3, which is then read as strictly as any other.

Version 1 called the base `reference`. Version 2 has no turns and tools of prompts, and no warnings.
"""

import json
from typing import Any

from quant_grids.errors import FormatError


def as_version_3(text: str | bytes) -> str | None:
    """A pack of an older version as the JSON of this version; None for any other text.

    Raises:
        FormatError: its answers cannot be judged without what that version left out.
    """
    try:
        old = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(old, dict) or "warnings" in old:
        return None
    if old.get("pack_version") == 1 and "base" not in old:
        base = old.pop("reference", None)
        if isinstance(base, dict) and base.get("role") == "reference":
            base = {**base, "role": "base"}
        old |= {"pack_version": 2, "base": base}
    suites = old.get("suites")
    if old.get("pack_version") != 2 or not isinstance(suites, list):
        return None
    return json.dumps({**old, "pack_version": 3, "suites": [_with_turns(s) for s in suites], "warnings": []})


def _with_turns(suite: Any) -> Any:
    """A suite of version 2 as one of this version."""
    if not isinstance(suite, dict) or not isinstance(suite.get("prompts"), list):
        return suite
    matchers = suite.get("matchers")
    if isinstance(matchers, list) and any(isinstance(one, dict) and one.get("type") == "tools" for one in matchers):
        raise FormatError(
            f"the suite {suite.get('name')} judges tool calls, and packs of version 2 do not hold the tools that were offered; "
            "record it again with `qguard-edge baseline`"
        )
    prompts = [
        {"turns": [], "tools": [], **prompt}
        if isinstance(prompt, dict) and not {"turns", "tools"} & prompt.keys()
        else prompt
        for prompt in suite["prompts"]
    ]
    return {**suite, "prompts": prompts}
