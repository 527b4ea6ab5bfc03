"""What each defense costs in fidelity on one model, measured in llama.cpp."""
