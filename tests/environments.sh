#!/usr/bin/env bash
# The default tests with the oldest versions that setup.cfg allows, and with other Pythons; each takes as long as
# tests/run.sh and downloads what it needs.
#   bash tests/environments.sh                            # the floors on the oldest Python, and the newest Python
#   bash tests/environments.sh python3.13                 # one Python, newest versions
#   FLOORS=python3.10 bash tests/environments.sh          # the floors alone
set -euo pipefail
cd "$(dirname "$0")/.."

floors=$(mktemp)
trap 'rm -f "$floors"' EXIT
python3 - >"$floors" <<'PYTHON'
import configparser, re

setup = configparser.ConfigParser()
setup.read("setup.cfg")
for line in (setup["options"]["install_requires"] + setup["options.extras_require"]["eval"]).splitlines():
    if floor := re.fullmatch(r"([\w.-]+)>=([\w.]+)", line.strip()):
        print(f"{floor[1]}=={floor[2]}")
PYTHON

[ $# -gt 0 ] || [ -n "${FLOORS:-}" ] || { FLOORS=python3.10 && set -- python3.13; }
if [ -n "${FLOORS:-}" ]; then
  echo "=== $FLOORS with the oldest versions"
  PYTHON=$FLOORS CONSTRAINTS=$floors bash tests/run.sh
fi
for python in "$@"; do
  echo "=== $python"
  PYTHON=$python bash tests/run.sh
done
