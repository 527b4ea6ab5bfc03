"""Learning in a conversion, the same for every output: the seed, the state of an unfinished run, the learning itself.

Only some defenses keep a state on disk (`DefenseOptions.resumes`), so only these go on with the seed of one, and a run
removes only its own. For every other the seed is fresh, so that no file that was left lying about makes it predictable.
"""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qguard_edge.conversion.activations import Activations
from qguard_edge.conversion.naming import checkpoint_path
from qguard_edge.conversion.request import ConversionRequest
from qguard_edge.defenses.base import Defense
from qguard_edge.defenses.options import DefenseOptions
from qguard_edge.learned.checkpoint import checkpoint_seed
from qguard_edge.learned.defense import LearnedDefense
from qguard_edge.learned.matrices import Target
from qguard_edge.learned.settings import LearnReport, LearnTask
from qguard_edge.progress import Progress
from qguard_edge.runtimes.hf import HfLoadError, check_hf_model


def require_transformers(defense: DefenseOptions, model: Path, *, trust_remote_code: bool = False) -> None:
    """Make sure, before anything takes minutes, that transformers knows the model that a defense will run.

    Raises:
        HfLoadError: it does not; says what can be done.
    """
    try:
        check_hf_model(model, trust_remote_code=trust_remote_code)
    except HfLoadError as error:
        ways = "give the folder of a model that it knows, or take --defense feedback, which runs in llama.cpp"
        raise HfLoadError(f"--defense {defense.name} runs the model in transformers: {error}; {ways}") from error


@dataclass(frozen=True)
class Learning:
    """What learning needs beside the model.

    Attributes:
        seed: of everything random in this conversion.
        checkpoint: where the state is kept until the output is finished; None for a defense that does not resume.
    """

    seed: int
    checkpoint: Path | None

    @classmethod
    def begin(cls, request: ConversionRequest, outfile: Path) -> "Learning":
        """Choose the seed: the user's, else that of an unfinished run of a defense that resumes, else a fresh one."""
        checkpoint = checkpoint_path(outfile) if request.defense.resumes else None
        seed = request.seed
        if seed is None and checkpoint is not None:
            seed = checkpoint_seed(checkpoint)
        return cls(secrets.randbits(63) if seed is None else seed, checkpoint)

    def learn(
        self,
        request: ConversionRequest,
        defense: Defense[Any],
        model: Path,
        target: Target,
        device: torch.device,
        progress: Progress,
        activations: Activations | None = None,
    ) -> LearnReport | None:
        """Let a learned defense run the model; nothing for the others.

        Args:
            request: of the conversion.
            defense: the rule.
            model: folder, or full-precision GGUF that transformers reads.
            target: the matrices to be rounded.
            device: where the model runs.
            progress: of the steps.
            activations: what is known of the matrices' inputs, for a defense that wants it.
        """
        if not isinstance(defense, LearnedDefense):
            return None
        return defense.prepare(
            LearnTask(
                model=model,
                target=target,
                seed=self.seed,
                device=device,
                calibration=request.calibration,
                text=activations.text if activations else None,
                inputs=activations.grams if activations else None,
                checkpoint=self.checkpoint,
                threads=request.threads,
                progress=progress,
                trust_remote_code=request.trusts_in_transformers,
            )
        )

    def end(self) -> None:
        """Remove the state once the output has its name; that of another run is left alone."""
        if self.checkpoint is not None and checkpoint_seed(self.checkpoint) == self.seed:
            self.checkpoint.unlink()
