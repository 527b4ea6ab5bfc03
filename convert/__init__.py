"""How bytes get into files: Hugging Face folder -> base GGUF, llama.cpp's plain GGUF, GGUF patch."""
