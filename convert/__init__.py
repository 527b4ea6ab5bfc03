"""How bytes get into files: Hugging Face folder -> base GGUF, llama.cpp reference, GGUF patch."""
