"""What ortho leaves of the old error direction by default, as docs/results.md says."""


def ortho_target(type_name: str) -> float:
    """Expected alignment of a tensor of this ggml type."""
    return -0.25 if type_name == "Q6_K" else 0.0
