"""The lab: real quantization-conditioned backdoors, made by the published attacks, and what each defense does to them."""
