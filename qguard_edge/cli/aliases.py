"""Old names of options: still taken, no longer shown."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from typer.core import TyperCommand


class RenamedOptions(TyperCommand):
    """A command that takes the old names of some of its options.

    Attributes:
        old_names: old -> new, both with their dashes.
    """

    old_names: ClassVar[Mapping[str, str]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `click.Command.parse_args`."""
        return super().parse_args(ctx, with_new_names(args, self.old_names))


def with_new_names(arguments: Sequence[str], old_names: Mapping[str, str]) -> list[str]:
    """Arguments in which every `--old` and `--old=VALUE` has its new name."""
    renamed = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        renamed.append(old_names.get(name, name) + equals + value)
    return renamed
