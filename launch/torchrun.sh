#!/usr/bin/env bash
# Train on the GPUs of this machine; every argument goes to dist_dcgan.train.
#   bash launch/torchrun.sh --data data/bedroom_train --run-dir runs/bedrooms
# On several machines, the same command on each, with their number and a free port of one of them:
#   NODES=2 HEAD=host1:29400 bash launch/torchrun.sh --data data/bedroom_train --run-dir runs/bedrooms
# RANKS: processes per machine, one per GPU by default. RESTARTS: how often ranks that failed are started again; they go
# on from the newest checkpoint. LOGS: a folder for what each rank prints, which is then prefixed with its number here.
# JOB: a name that the machines share and no other run has. COMMAND: doctor or evaluate instead of train.
set -euo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100} # seconds to save after a signal

meeting=(--standalone)
if [ "${NODES:-1}" -gt 1 ]; then
  [ -n "${HEAD:-}" ] || { echo "error: NODES=$NODES, but not where they meet: HEAD=HOST:PORT" >&2; exit 2; }
  meeting=(--nnodes="$NODES" --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${JOB:-dist_dcgan}")
fi
if [ -n "${LOGS:-}" ]; then
  meeting+=(--log-dir="$LOGS/$(hostname)" --tee=3)
  # shellcheck disable=SC2016  # torchrun fills it in
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
fi

# The watch looks after torchrun, which takes the place of this script below, so that it has its number. It says so where
# the machines have not met; and it kills a torchrun that hangs after its ranks have ended, as when a network is cut.
watch() {
  local without=0 started=
  trap '' TERM INT HUP QUIT USR1
  while is_child; do
    if has_ranks; then started=yes without=0; else without=$((without + 1)); fi
    if [ -n "$started" ] && [ "$without" -gt "${ORPHANED_SECONDS:-150}" ]; then
      kill_torchrun "its ranks ended $without seconds ago"
    elif [ -n "$started" ] && [ "$without" -ge 2 ] && ! reaches_head; then
      kill_torchrun "$HEAD, where the machines meet, cannot be reached"
    fi
    sleep 1
  done
  if [ -z "$started" ] && [ "${NODES:-1}" -gt 1 ]; then
    echo "error: $(hostname) has not met the $NODES machines at $HEAD: does each run this command, and is the port open?" >&2
  fi
}
is_child() { # until torchrun has ended, even where nobody has asked how
  local parent
  read -r _ _ _ parent _ <"/proc/$BASHPID/stat" && [ "$parent" = $$ ]
}
has_ranks() {
  local child
  # shellcheck disable=SC2013  # numbers
  for child in $(cat /proc/$$/task/$$/children 2>/dev/null); do
    ! grep -qz '^RANK=' "/proc/$child/environ" 2>/dev/null || return 0
  done
  return 1
}
reaches_head() { # refused is an answer: then torchrun notices by itself
  local error
  [ "${NODES:-1}" -gt 1 ] || return 0
  error=$(LC_ALL=C timeout 2 bash -c ": < /dev/tcp/${HEAD%:*}/${HEAD##*:}" 2>&1) || [[ $error == *refused* ]]
}
kill_torchrun() {
  kill -KILL $$ 2>/dev/null || return 0
  echo "error: torchrun on $(hostname) hangs and is killed: $1" >&2
}
watch &

exec torchrun "${meeting[@]}" --nproc_per_node="${RANKS:-gpu}" --max-restarts="${RESTARTS:-3}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m "dist_dcgan.${COMMAND:-train}" "$@"
