#!/usr/bin/env bash
# Lint and tests in a fresh virtual environment: the default in ten minutes, everything and types with --all.
#   bash tests/run.sh [--all] [--long] [PYTEST ARGUMENTS]
# --all also runs the tests marked slow and those that need system packages (SLURM, network namespaces, a browser), which it
# installs if run as root on Debian or Ubuntu. --long also runs stories of many minutes. DIST_DCGAN_PHOTOS may name a folder
# of real photographs in LSUN's format (clothing_val_lmdb.zip); without it rendered bedrooms are used. PYTHON: the Python of
# the environment. CONSTRAINTS: a file of versions for pip. WORKERS: tests at a time, by default one more than cores, 4 at
# most.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(mktemp -d)/venv
trap 'rm -rf "$(dirname "$venv")"' EXIT
system_packages="slurm-wlm slurm-wlm-basic-plugins munge iproute2 libarchive-tools"
extras=test,eval,video,onnx
install() { # apart, as one that a distribution lacks must not keep the others away
  echo "== system packages: $*"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } \
    >/dev/null || echo "not installed: the tests that need them are left out" >&2
}
if [[ " $* " == *" --all "* ]]; then
  extras+=,browser
  if [ "$(id -u)" = 0 ]; then
    # shellcheck disable=SC2086  # several words
    { command -v slurmctld && command -v ip && command -v bsdtar; } >/dev/null || install $system_packages
    command -v chromium >/dev/null || install chromium
  fi
fi

echo "== install"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-compile ${CONSTRAINTS:+--constraint "$CONSTRAINTS"} \
  -e ".[$extras]"
export PATH="$venv/bin:$PATH"
unset PYTHON # of the environment, not of the scripts that the tests start
unset PYTHONDONTWRITEBYTECODE # as images of containers set it: every process would compile what it imports
python -m compileall -q -j 0 "$venv/lib" dist_dcgan shards tests >/dev/null || true # packages hold files of other Pythons

echo "== lint"
ruff check .
ruff format --check .
types=
if [[ " $* " == *" --all "* ]]; then
  mypy >"$(dirname "$venv")/types" 2>&1 & # beside the tests, many of which wait
  types=$!
fi

echo "== tests"
cores=$(python -c "import os; print(len(os.sched_getaffinity(0)))")  # nproc would believe OMP_NUM_THREADS
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # threads of several workers would wait for each other's cores
failed=0
python -m pytest --numprocesses "${WORKERS:-$((cores < 4 ? cores + 1 : 4))}" --dist loadfile --no-loadscope-reorder \
  --durations 25 "$@" || failed=$?

if [ -n "$types" ]; then
  echo "== types"
  wait "$types" || failed=1
  cat "$(dirname "$venv")/types"
fi
exit "$failed"
