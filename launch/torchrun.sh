#!/usr/bin/env bash
# Train on the GPUs of this machine; every argument goes to dist_dcgan.train.
#   bash launch/torchrun.sh --data data/bedroom_train --run-dir runs/bedrooms
# RANKS: processes to start, one per GPU by default. RESTARTS: how often ranks that failed are started again; they go on
# from the newest checkpoint. TORCHRUN_OPTIONS: how nodes meet, by default there is one.
set -euo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100} # seconds to save after a signal

# Torchrun may hang after its ranks have ended, as when a network is cut: then it is killed. It takes the place of this
# script below, so that it has its number, and the watch among its children.
watch() {
  local without=0 started=
  while kill -0 $$ 2>/dev/null; do
    if has_ranks; then started=yes without=0; else without=$((without + 1)); fi
    if [ -n "$started" ] && [ "$without" -gt "${ORPHANED_SECONDS:-150}" ]; then
      echo "error: torchrun hangs: its ranks ended $without seconds ago: it is killed" >&2
      kill -KILL $$
    fi
    sleep 1
  done
}
has_ranks() {
  local child
  for child in $(cat /proc/$$/task/$$/children 2>/dev/null); do
    ! grep -qz '^RANK=' "/proc/$child/environ" 2>/dev/null || return 0
  done
  return 1
}
watch &

# shellcheck disable=SC2086  # the options are several words
exec torchrun ${TORCHRUN_OPTIONS:---standalone} --nproc_per_node="${RANKS:-gpu}" --max-restarts="${RESTARTS:-3}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m dist_dcgan.train "$@"
