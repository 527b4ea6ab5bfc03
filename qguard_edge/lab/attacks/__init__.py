"""The published attacks, one file each, on the same boxes, training loop and scenarios."""
