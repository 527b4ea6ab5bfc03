"""Model folders are downloads: links that leave them, FIFOs and devices are refused, wherever a file is opened."""

import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from convert.hf.checkpoint import Checkpoint
from convert.hf.jsonfile import read_json
from convert.hf_folder import copy_side_files
from convert.reading import check_folder, check_inside, open_file, read_file, read_text
from convert.source import resolve_source
from quant_grids.errors import FormatError, QGuardError


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """Opening a FIFO waits for a writer that never comes: then the alarm ends the test."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("BEGIN PRIVATE KEY")
    return path


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


NAMES = (
    "chat_template.jinja",
    "LICENSE",
    "generation_config.json",
    "tokenizer_config.json",
    "model.safetensors",
    "README.md",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "reader",
    [
        lambda folder: resolve_source(str(folder)),
        check_folder,
        Checkpoint.open,
        lambda folder: copy_side_files(folder, folder),
    ],
)
def test_a_link_out_of_the_folder_is_refused(
    name: str, reader: Callable[[Path], object], folder: Path, secret: Path
) -> None:
    """`ln -s ~/secret tiny/chat_template.jinja; convert tiny` put the secret into the GGUF."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(Path("..") / secret.name)
    with pytest.raises(FormatError, match="leads out of the model folder model"):
        reader(folder)


def test_a_folder_of_templates_that_is_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text("BEGIN PRIVATE KEY")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="leads out"):
        resolve_source(str(folder))


def test_links_within_a_folder_and_to_what_is_not_read_are_fine(folder: Path, secret: Path) -> None:
    (folder / "chat_template.jinja").symlink_to("tokenizer.json")
    (folder / "notes.pdf").symlink_to(secret)
    (folder / "data").symlink_to(secret.parent)
    check_folder(folder)


def test_a_link_to_the_folder_itself_is_fine(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    check_folder(tmp_path / "link")
    assert read_json(tmp_path / "link" / "config.json")["model_type"] == "llama"


def test_the_hubs_cache_is_judged_by_where_the_target_lies(tiny_folder: Path, secret: Path, tmp_path: Path) -> None:
    store = tmp_path / "models--owner--name"
    snapshot = store / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (store / "blobs").mkdir()
    for number, file in enumerate(sorted(tiny_folder.iterdir())):
        shutil.copyfile(file, store / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert Checkpoint.open(snapshot).tensors
    assert read_json(snapshot / "config.json")["model_type"] == "llama"
    (store / "blobs" / "evil").symlink_to(secret)
    for target in ("../../blobs/evil", "../../../secret", "../../refs"):
        (snapshot / "LICENSE").unlink(missing_ok=True)
        (snapshot / "LICENSE").symlink_to(target)
        with pytest.raises(FormatError, match="leads out"):
            check_folder(snapshot)


def test_blobs_that_are_a_link_are_no_store(secret: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--o--n" / "blobs").symlink_to(tmp_path)
    (snapshot / "LICENSE").symlink_to(f"../../blobs/{secret.name}")
    with pytest.raises(FormatError, match="leads out"):
        check_inside(snapshot, snapshot / "LICENSE")


def test_a_fifo_and_a_device_are_refused_at_once(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, kind in ((tmp_path / "fifo", "a FIFO"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(FormatError, match=f"is not a regular file but {kind}"):
            open_file(path)
    os.mkfifo(folder / "generation_config.json.txt")
    with pytest.raises(FormatError, match="a FIFO"):
        check_folder(folder)


def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("12345")
    assert read_file(path, 5) == b"12345"
    assert read_text(path, 5) == "12345"
    with pytest.raises(FormatError, match="5 bytes, more than the 4"):
        read_file(path, 4)
    tracemalloc.start()
    read_file(path, 1 << 30)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20  # the limit is no size
    tracemalloc.stop()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.mkdir()], ids=["fifo", "folder"])
def test_every_reader_refuses_what_is_no_file(make: Callable[[Path], None], tiny_base: Path, tmp_path: Path) -> None:
    """FIFOs hung `inspect`, `verify`, `check`, `apply` and `--suite`."""
    from convert.gguf_file import GgufFile
    from convert.imatrix_file import load_imatrix
    from qguard_edge.conversion.plan_file import read_plan
    from qguard_edge.packs.pack import read_pack
    from qguard_edge.runtimes.fidelity import read_texts
    from qguard_edge.verify.suites.files import read_suite

    path = tmp_path / "x.yaml"
    make(path)
    for reader in (GgufFile, load_imatrix, read_plan, read_pack, read_texts, read_suite):
        with pytest.raises(QGuardError):
            reader(path)
