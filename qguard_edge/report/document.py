"""The JSON documents of the command line and of scripts: one version for all but those of `verify`, which have their own."""

import json
from collections.abc import Mapping
from typing import Any

SCHEMA_VERSION = 2


def versioned(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with its schema version first."""
    return {"schema_version": SCHEMA_VERSION, **document}


def json_text(document: Mapping[str, Any]) -> str:
    """A document as JSON text, with its schema version."""
    text = json.dumps(versioned(document), indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # half a surrogate pair becomes its escape in JSON
