"""The walk over tensors: every quantized tensor is cut into slices, and a defense chooses each slice's rounding."""
