#!/usr/bin/env bash
# Does a built wheel work outside the checkout? Usage: scripts/try_wheel.sh WHEEL
#
# Installs it into an empty environment in a temporary folder, then makes a tiny model, converts it, compares the result
# with llama.cpp's own file, verifies it, and runs the Python examples. PIP_CONSTRAINT and PIP_FIND_LINKS, if set, are pip's.
set -euo pipefail
wheel=$(realpath "$1")
examples=$(realpath "$(dirname "$0")/../docs/examples")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q "$wheel"
export PATH="$place/venv/bin:$PATH"

said=$(qguard-edge --version)
version=$(basename "$wheel" | cut -d- -f2)
[ "$said" = "qguard-edge $version" ] || { echo "error: $(basename "$wheel") says it is '$said'" >&2; exit 1; }
python "$examples/tiny_model.py" tiny
qguard-edge convert tiny --to q4_0 --defense ortho --seed 1 --keep-reference
qguard-edge diff tiny-Q4_0.reference.gguf tiny-Q4_0.gguf --quiet
qguard-edge inspect tiny-Q4_0.gguf
echo "$said works"
