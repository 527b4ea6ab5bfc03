"""The flags that cut an output into shards, for every command that has them."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from convert.split import SplitRule


def split_max_size_option() -> Any:
    """`--split-max-size`."""
    return typer.Option(metavar="N(M|G)", help="Cut the output into shards of at most this size, as llama-gguf-split does.")


def split_max_tensors_option() -> Any:
    """`--split-max-tensors`."""
    return typer.Option(min=1, help="Cut the output into shards of at most this many tensors.")


def keep_split_option() -> Any:
    """`--keep-split`."""
    return typer.Option("--keep-split", help="Cut the output as the input is cut.")


SplitMaxSizeFlag = Annotated[str | None, split_max_size_option()]
SplitMaxTensorsFlag = Annotated[int | None, split_max_tensors_option()]
KeepSplitFlag = Annotated[bool, keep_split_option()]


def split_rule(max_size: str | None, max_tensors: int | None, keep: bool) -> "SplitRule | None":
    """How the output is cut, if it is.

    Raises:
        UnsupportedError: more than one of the flags, or a size that is none.
    """
    if max_size is None and max_tensors is None and not keep:
        return None
    from convert.split import SplitRule, parse_split_size

    rule = SplitRule(parse_split_size(max_size) if max_size is not None else 0, max_tensors or 0, keep)
    rule.check()
    return rule
