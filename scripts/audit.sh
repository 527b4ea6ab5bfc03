#!/usr/bin/env bash
# Does anything that a wheel brings along have a known vulnerability? Usage: scripts/audit.sh WHEEL
#
# pip says what it would install beside the wheel today, without building or installing it, and pip-audit asks PyPI's list of
# vulnerabilities about each. Ends with 1 if there is one. The release workflow runs it before anything is published.
set -euo pipefail
wheel=$(realpath "$1")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"${PYTHON:-python3}" -m venv "$place/venv"
pip() { "$place/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q "pip-audit>=2.10,<3"
pip install -q --dry-run --ignore-installed --report "$place/report.json" "$wheel"
"$place/venv/bin/python" - "$place/report.json" > "$place/pinned.txt" <<'PYTHON'
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    found = [entry["metadata"] for entry in json.load(file)["install"]]
print("\n".join(f"{one['name']}=={one['version']}" for one in found if one["name"] != "qguard-edge"))
PYTHON
echo "$(wc -l < "$place/pinned.txt") packages"
"$place/venv/bin/pip-audit" --no-deps --disable-pip --requirement "$place/pinned.txt"
