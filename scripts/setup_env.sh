#!/usr/bin/env bash
# Make the virtual environment. Usage, at the root of the repository: scripts/setup_env.sh VENV_FOLDER [docs]
#
# With `docs` it holds what builds the documentation alone: neither torch nor llama.cpp, nor this project.
# llama-cpp-python comes as source and takes minutes to build, for the processor it is built on. The wheel is kept in
# ~/.cache/qguard-edge/wheels, in a folder named after the processor's features, and used again when they match.
# Which versions are wanted stands in pyproject.toml alone.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) is too old; qguard-edge needs Python 3.11 or newer (make PYTHON=python3.11 ...)" >&2
    exit 2
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# The requirements in pyproject.toml that begin with a word, one per line: in `list.path`, such as project.dependencies.
wanted() {
    "$venv/bin/python" - "$@" <<'PYTHON'
import functools, sys, tomllib
path, word = sys.argv[1:]
with open("pyproject.toml", "rb") as file:
    listed = functools.reduce(dict.__getitem__, path.split("."), tomllib.load(file))
found = [requirement for requirement in listed if requirement.startswith(word)]
print("\n".join(found) if found else sys.exit(f"error: pyproject.toml lists no {word} in {path}"))
PYTHON
}
if [ "${2:-}" = docs ]; then
    wanted project.optional-dependencies.docs "" > "$venv/docs.txt"
    wanted project.dependencies typer >> "$venv/docs.txt"
    wanted project.optional-dependencies.dev ruff >> "$venv/docs.txt"
    pip install -q -r "$venv/docs.txt"
    exit
fi
torch=$(wanted tool.qguard-edge.install-first torch)
llama=$(wanted project.dependencies llama-cpp-python)

features=$( (uname -m; grep -m1 -E '^(flags|Features)' /proc/cpuinfo || true; "$venv/bin/python" --version) | sha256sum | cut -c1-12)
wheels="${XDG_CACHE_HOME:-$HOME/.cache}/qguard-edge/wheels/$features"
install_kept_llama() { pip install -q --no-deps --no-index --find-links "$wheels" "$llama"; }
mkdir -p "$wheels"
ls "$wheels"/llama_cpp_python-*.whl >/dev/null 2>&1 || [ -x "$(command -v "${CC:-cc}")" ] || [ -x "$(command -v gcc)" ] || {
    echo "error: llama.cpp is built here, and there is no C/C++ compiler: apt-get install build-essential," >&2
    echo "       dnf install gcc gcc-c++ make, or xcode-select --install (docs/howto/install.md)" >&2
    exit 2
}
"$venv/bin/python" -c 'import torch' 2>/dev/null || pip install -q "$torch"

if ! install_kept_llama 2>/dev/null; then
    echo "building llama-cpp-python (about 4 minutes on 2 cores, once) ..."
    building=$(mktemp -d "$wheels/.building-XXXXXX")
    trap 'rm -rf "$building"' EXIT
    CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" pip wheel -q --no-deps -w "$building" "$llama"
    mv "$building"/*.whl "$wheels/"
    install_kept_llama
fi
pip install -q --no-deps --require-hashes -r scripts/demo-pins.txt
pip install -q -e ".[dev,demo]"
