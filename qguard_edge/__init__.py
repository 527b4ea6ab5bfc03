"""qguard-edge: quantize language models with rounding decisions that keep conditioned backdoors asleep."""

__version__ = "0.1.0"
