#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, types, tests, in a fresh virtual environment.
#   bash tests/run.sh [--with-system] [PYTEST ARGUMENTS]
# --with-system also runs what needs system packages. DIST_DCGAN_PHOTOS may name a folder of real photographs in
# LSUN's format (clothing_val_lmdb.zip); rendered bedrooms take their place where it is absent.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(mktemp -d)/venv
trap 'rm -rf "$(dirname "$venv")"' EXIT
echo "== install"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -e ".[test,eval]"
export PATH="$venv/bin:$PATH"

echo "== lint and types"
ruff check .
ruff format --check .
mypy

echo "== tests"
python -m pytest "$@"
