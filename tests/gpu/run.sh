#!/usr/bin/env bash
# Everything that a GPU has to tell about this project, within the minutes that somebody lends one.
#   bash tests/gpu/run.sh [--out DIR] [--photos TAR] [--part check|speed|train] [--only NAMES] [--budget SECONDS] [--rehearse]
# Runs from the checkout with the Python that is there (PYTHON names another); needs no network, no W&B and no installation.
# --rehearse runs every item at toy size on the CPU. README.md beside this file says how to read what it prints.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" WANDB_MODE=disabled
exec "${PYTHON:-python3}" -m tests.gpu "$@"
