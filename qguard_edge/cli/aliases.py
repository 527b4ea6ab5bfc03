"""Old names of options: still taken, no longer shown."""

from collections.abc import Container, Mapping, Sequence
from typing import Any, ClassVar

from typer.core import TyperCommand

from quant_grids.errors import UnsupportedError


class RenamedOptions(TyperCommand):
    """A command that takes the old names of some of its options.

    Attributes:
        old_names: old -> new, both with their dashes.
    """

    old_names: ClassVar[Mapping[str, str]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `click.Command.parse_args`."""
        flags = {name for parameter in self.params if getattr(parameter, "is_flag", False) for name in parameter.opts}
        return super().parse_args(ctx, with_new_names(args, self.old_names, flags))


def with_new_names(arguments: Sequence[str], old_names: Mapping[str, str], flags: Container[str] = ()) -> list[str]:
    """Arguments in which every `--old` and `--old=VALUE` has its new name.

    Args:
        arguments: of the command.
        old_names: old -> new.
        flags: new names of options without a value.

    Raises:
        UnsupportedError: an option is given under both names, with different values.
    """
    renamed: list[str] = []
    given: dict[str, dict[str, str]] = {}
    arguments = list(arguments)
    for place, argument in enumerate(arguments):
        if argument == "--":
            return [*renamed, *arguments[place:]]
        name, equals, value = argument.partition("=")
        new = old_names.get(name, name)
        if new in old_names.values() and new not in flags:
            given.setdefault(new, {})[name] = value if equals else "".join(arguments[place + 1 : place + 2])
        renamed.append(new + equals + value)
    for new, values in given.items():
        old = next((name for name in values if name != new), None)
        if old and len(set(values.values())) > 1:
            raise UnsupportedError(f"{old} is the old name of {new}, and they have different values: give {new} alone")
    return renamed
