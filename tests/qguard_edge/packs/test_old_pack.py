"""Packs of older versions: `data/pack-1.json` and `data/pack-2.json` were written by them.

Version 1 called the base `reference`; version 2 has no turns, tools and warnings.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from convert.ftypes import parse_file_type
from convert.hashes import sha256_of
from convert.quantizer import QuantizeOptions, quantize
from qguard_edge.packs.check import CheckRequest, check
from qguard_edge.packs.pack import PACK_VERSION, PackError, pack_from_json, pack_to_json, read_pack
from qguard_edge.verify.results import Verdict

OLD = Path(__file__).parent / "data" / "pack-1.json"
SECOND = Path(__file__).parent / "data" / "pack-2.json"


def document() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(OLD.read_text(encoding="utf-8"))
    return read


def test_the_old_pack_is_read_as_one_of_this_version() -> None:
    old, pack = document(), read_pack(OLD)
    assert old["pack_version"] == 1
    assert pack.pack_version == PACK_VERSION == 3
    assert (pack.base.role, pack.base.sha256) == ("base", old["reference"]["sha256"])
    assert [text.tokens for text in pack.texts] == [tuple(text["tokens"]) for text in old["texts"]]
    written = without_news(json.loads(pack_to_json(pack)))
    assert {**written, "pack_version": 1, "reference": old["reference"]} == {**old, "base": written["base"]}


def test_a_pack_of_version_2_is_one_without_turns_and_tools() -> None:
    old = json.loads(SECOND.read_text(encoding="utf-8"))
    pack = read_pack(SECOND)
    assert all((prompt.turns, prompt.tools) == ((), ()) for suite in pack.suites for prompt in suite.prompts)
    assert {**without_news(json.loads(pack_to_json(pack))), "pack_version": 2} == old


def test_a_pack_of_version_2_cannot_judge_tool_calls() -> None:
    """It held the prompts without their tools, so a call's arguments could not be compared with the tool's own values."""
    old = json.loads(SECOND.read_text(encoding="utf-8"))
    old["suites"][0]["matchers"] = [{"type": "tools"}]
    with pytest.raises(PackError, match=r"do not hold the tools .* record it again"):
        pack_from_json(json.dumps(old))


def without_news(pack: dict[str, Any]) -> dict[str, Any]:
    """A pack without what only this version has; all of it must be empty."""
    assert pack.pop("warnings") == []
    for suite in pack["suites"]:
        for prompt in suite["prompts"]:
            assert (prompt.pop("turns"), prompt.pop("tools")) == ([], [])
    return pack


def test_the_layout_of_the_json_does_not_matter() -> None:
    assert pack_from_json(json.dumps(dict(reversed(document().items())), indent=2)) == read_pack(OLD)


def test_a_file_is_checked_against_the_old_pack(tiny_base: Path, tmp_path: Path) -> None:
    """The pack is from the tests' tiny model: that model itself has no drift, its Q8_0 a little, its Q2_K much more."""
    pack = read_pack(OLD)
    assert pack.base.sha256 == sha256_of([tiny_base])
    drift = {}
    for to in ("bf16", "q8_0", "q2_k"):
        file = tiny_base
        if to != "bf16":
            file = tmp_path / f"{to}.gguf"
            quantize(tiny_base, file, QuantizeOptions(parse_file_type(to), threads=1))
        found = check(CheckRequest(pack, candidate=file, threads=1))
        assert found.drift is not None
        assert found.check("drift/mean-kl").verdict is Verdict.PASS
        assert [facts.role for facts in found.files] == ["candidate", "base"]
        drift[to] = found.drift.candidate.mean_kl
    assert drift["bf16"] < 1e-6 < drift["q8_0"] < 0.2 * drift["q2_k"]


@pytest.mark.parametrize("change", [{"base": {}}, {"reference": None}, {"surprise": 1}, {"vocabulary": "386"}])
def test_old_packs_are_read_as_strictly(change: dict[str, Any]) -> None:
    with pytest.raises(PackError, match="not a baseline pack"):
        pack_from_json(json.dumps({**document(), **change}))
