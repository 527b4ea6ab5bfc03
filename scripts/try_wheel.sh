#!/usr/bin/env bash
# Does a built wheel work outside the checkout? Usage: scripts/try_wheel.sh WHEEL
#
# Installs it into an empty environment in a temporary folder, then runs the demo, and makes a tiny model, converts it, compares the result
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
qguard-edge demo --threads 1
python "$examples/tiny_model.py" tiny
qguard-edge convert tiny --to f32
qguard-edge convert tiny --to q4_0 --defense ortho --seed 1 --keep-plain
qguard-edge diff tiny-Q4_0.plain.gguf tiny-Q4_0.gguf --quiet
qguard-edge inspect tiny-Q4_0.gguf

# With random weights any verdict will do. A traceback exits with 1 too, so what was written is looked at as well.
judged() { local code=0; "$@" || code=$?; case $code in 0 | 1 | 3) ;; *) return "$code" ;; esac; }
judged qguard-edge verify tiny-Q4_0.gguf --base tiny-F32.gguf --limit 4 --quiet -o verified
judged python "$examples/convert_and_check.py" tiny hardened.gguf | tee checked.txt
judged python "$examples/gate_in_ci.py" tiny gate.gguf gate.json --limit 4
printf 'The first text.\n\nAnother one, a little longer.\n' > texts.txt
python "$examples/compare_defenses.py" tiny texts.txt compare.csv
grep -q '"verdict"' verified/verify.json
grep -q drift/mean-kl checked.txt
grep -q '"verdict"' gate.json
echo "$said works"
