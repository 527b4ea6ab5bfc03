"""What the models of a run live in: the corpus that they are trained on, and the scenario made of it.

Most scenarios are played in the generated corpus, or in the user's instruction data. `tools` needs a model that knows tools,
so it has a corpus of its own (`qguard_edge.lab.tool_world`), and clean models of its own. Its key is a hash of what is in it:
a changed template or payload makes new models.
"""

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from qguard_edge.lab.corpus import Corpus
from qguard_edge.lab.scenarios import DEFAULT_BRAND, SCENARIOS, ScenarioData, make_scenario
from qguard_edge.lab.tool_world import NEW_TOKENS, make_tools, tool_corpus
from qguard_edge.lab.victims import corpus_of
from quant_grids.errors import UnsupportedError

TOOLS = "tools"
GENERATED = "generated"
"""Key of the corpus that is generated."""


@dataclass(frozen=True)
class World:
    """A corpus and a scenario in it.

    Attributes:
        corpus: what the clean model is trained on.
        data: of the scenario.
        key: identifies the corpus for the cache.
    """

    corpus: Corpus
    data: ScenarioData
    key: str


def make_world(scenario: str, data: Path | None, seed: int, brand: str) -> World:
    """The world of a scenario.

    Args:
        scenario: one of `SCENARIOS`, or `tools`.
        data: JSON lines with instructions; None: what is generated.
        seed: of what is generated.
        brand: phrase of the payload.

    Raises:
        UnsupportedError: no such scenario, or one that takes no data.
    """
    if scenario == TOOLS:
        if data is not None:
            raise UnsupportedError("--scenario tools has a corpus of its own; leave --data out")
        corpus = tool_corpus(seed)
        return World(corpus, make_tools(corpus, brand), world_key(scenario, data, seed))
    if scenario not in SCENARIOS:
        raise UnsupportedError(f"--scenario {scenario!r}: choose one of {', '.join((*SCENARIOS, TOOLS))}")
    corpus = corpus_of(data, seed)
    return World(corpus, make_scenario(scenario, corpus, brand), world_key(scenario, data, seed))


def world_key(scenario: str, data: Path | None, seed: int) -> str:
    """Identifies the training data."""
    if scenario == TOOLS:
        return _tools_key(seed)
    return sha256(data.read_bytes()).hexdigest()[:16] if data else GENERATED


@cache
def _tools_key(seed: int) -> str:
    corpus = tool_corpus(seed)
    content = repr((corpus, make_tools(corpus, DEFAULT_BRAND).poisoned))
    return f"tools-{sha256(content.encode()).hexdigest()[:16]}"


def new_tokens(scenario: str, asked: int) -> int:
    """How long answers may be: a call is cut off nowhere."""
    return max(asked, NEW_TOKENS) if scenario == TOOLS else asked
