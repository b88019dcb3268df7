#!/usr/bin/env bash
# Everything that must hold before a change lands: lint, types, tests, in a fresh virtual environment.
#   bash tests/run.sh [--with-system] [PYTEST ARGUMENTS]
# --with-system also runs what needs system packages (a SLURM cluster, network namespaces), and installs them if run
# as root on Debian or Ubuntu; if they are missing, these tests are skipped. DIST_DCGAN_PHOTOS may name a folder of real
# photographs in LSUN's format (clothing_val_lmdb.zip); without it rendered bedrooms are used.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(mktemp -d)/venv
trap 'rm -rf "$(dirname "$venv")"' EXIT
system_packages="slurm-wlm slurm-wlm-basic-plugins munge iproute2"
if [[ " $* " == *" --with-system "* ]] && [ "$(id -u)" = 0 ] && ! { command -v slurmctld && command -v ip; } >/dev/null; then
  echo "== system packages: $system_packages"
  # shellcheck disable=SC2086  # several words
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $system_packages; } \
    >/dev/null || echo "not installed: the tests that need them are skipped" >&2
fi

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
