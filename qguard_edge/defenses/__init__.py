"""Rounding defenses, one per file; `options` lists them."""
