"""Learned rounding: which flips to take, found by looking at what the whole model (or one block of it) then computes."""
