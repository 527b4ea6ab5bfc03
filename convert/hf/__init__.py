"""Hugging Face folder -> full-precision GGUF, and back from torch parameters to GGUF rows."""
