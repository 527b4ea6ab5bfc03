"""Running a model: what llama.cpp and transformers compute on the way to their logits."""
