#!/usr/bin/env bash
# Make the virtual environment. Usage: scripts/setup_env.sh VENV_FOLDER
#
# llama-cpp-python comes as source and takes minutes to build, for the processor it is built on. The wheel is kept in
# ~/.cache/qguard-edge/wheels, in a folder named after the processor's features, and used again when they match.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}
llama="llama-cpp-python>=0.3.36,<0.4"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) is too old; qguard-edge needs Python 3.11 or newer (make PYTHON=python3.11 ...)" >&2
    exit 2
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# torch first and pinned: a looser wish may bring several gigabytes of CUDA packages.
"$venv/bin/python" -c 'import torch' 2>/dev/null || pip install -q "torch==2.13.0"

features=$( (uname -m; grep -m1 -E '^(flags|Features)' /proc/cpuinfo || true; "$venv/bin/python" --version) | sha256sum | cut -c1-12)
wheels="${XDG_CACHE_HOME:-$HOME/.cache}/qguard-edge/wheels/$features"
if ! "$venv/bin/python" -c 'import llama_cpp' 2>/dev/null; then
    if ! ls "$wheels"/llama_cpp_python-*.whl >/dev/null 2>&1; then
        echo "building llama-cpp-python (about 4 minutes on 2 cores, once) ..."
        mkdir -p "$wheels"
        building=$(mktemp -d "$wheels/.building-XXXXXX")
        trap 'rm -rf "$building"' EXIT
        CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" pip wheel -q --no-deps -w "$building" "$llama"
        mv "$building"/*.whl "$wheels/"
    fi
    pip install -q "$wheels"/llama_cpp_python-*.whl
fi
pip install -q -e ".[dev,demo]"
