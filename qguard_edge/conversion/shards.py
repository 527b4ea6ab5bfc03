"""An output that is cut into shards: its names, the cut itself, held against the whole, and the shards' way to their names."""

from collections.abc import Iterable
from pathlib import Path

from convert.atomic import OutputError, commit
from convert.cores import available_cores
from convert.diff import compare_files
from convert.disk import require_space
from convert.gguf_file import GgufFile, GgufModel
from convert.outputs import Written, check_outputs
from convert.split import SplitRule, existing_shards, is_shard_name, shares_of, write_shards
from quant_grids.errors import QGuardError


class SelfCheckError(QGuardError):
    """The written file is not what the plan says; it was thrown away."""


def check_shard_names(outfiles: Iterable[Path], inputs: Iterable[Path | str | None], *, overwrite: bool) -> None:
    """Refuse names of outputs that are to be cut; how many shards there will be is not known, so those of any number count.

    Args:
        outfiles: the output's name, without `-00001-of-...`, and those of files beside it.
        inputs: what the command reads.
        overwrite: whether existing shards may be replaced.

    Raises:
        OutputError: naming the path and the way out.
    """
    names = list(outfiles)
    if is_shard_name(names[0].name):
        raise OutputError(f"{names[0].name} is the name of a shard; give the name without -00001-of-... with --outfile")
    check_outputs([Written(shard) for path in names for shard in existing_shards(path)], inputs, overwrite=overwrite)


def cut(whole: Path, rule: SplitRule, like: GgufModel, name: str, threads: int = 0) -> Path:
    """Cut a file into shards beside it, hold them against it, and remove it.

    Args:
        whole: what is cut.
        rule: how.
        like: the model whose shards `SplitRule.like_input` follows.
        name: that the whole would have.
        threads: of the comparison; 0 for one per core.

    Returns:
        The first shard.

    Raises:
        SelfCheckError: the shards are not the whole.
    """
    file = GgufFile(whole)
    require_space(whole.parent, file.size, "the shards, beside the whole")
    first = write_shards(file, shares_of(file, rule, like), whole.parent, name)[0]
    if fault := compare_files(whole, first, threads=threads or available_cores()).fault({}):
        raise SelfCheckError(f"cut into shards, {fault}; please report this")
    whole.unlink()
    return first


def commit_shards(first: Path, outfile: Path) -> Path:
    """Give shards their names, the first one last, so that a model that can be found is complete; returns its name."""
    for shard in reversed(GgufModel(first).shards):
        commit(shard.path, outfile.with_name(shard.path.name))
    return outfile.with_name(first.name)
