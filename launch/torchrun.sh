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

command -v torchrun >/dev/null || { echo "error: no torchrun: activate the environment of dist_dcgan" >&2; exit 2; }
meeting=(--standalone)
if [ "${NODES:-1}" -gt 1 ]; then
  [[ ${HEAD:-} =~ ^.+:[0-9]+$ ]] || { echo "error: NODES=$NODES, HEAD=${HEAD:-}: they meet at HEAD=HOST:PORT" >&2; exit 2; }
  meeting=(--nnodes="$NODES" --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${JOB:-dist_dcgan}")
fi
if [ -n "${LOGS:-}" ]; then
  meeting+=(--log-dir="$LOGS/$(hostname)" --tee=3)
  # shellcheck disable=SC2016  # torchrun fills it in
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
fi

# The watch looks after torchrun, which takes the place of this script below, so that it has its number. It says so where
# the machines have not met; and it kills a torchrun whose ranks have ended and that hangs, as when a network is cut, or
# waits for machines that do not come back.
watch() {
  local without=0 cut=0 started=
  trap '' TERM INT HUP QUIT USR1
  while is_child; do
    if has_ranks; then started=yes without=0; else without=$((without + 1)); fi
    if [ -n "$started" ] && [ "$without" -gt "${ORPHANED_SECONDS:-150}" ]; then
      kill_torchrun "its ranks ended $without seconds ago, and it has not started others"
    elif [ -n "$started" ] && [ "$without" -ge 1 ] && is_cut_off; then
      cut=$((cut + 1))
      [ "$cut" -lt 2 ] || kill_torchrun "$HEAD, where the machines meet, cannot be reached"
    else
      cut=0
    fi
    sleep 1
  done
  if [ -z "$started" ] && [ "${NODES:-1}" -gt 1 ]; then
    echo "error: torchrun on $(hostname) ended before it started ranks: if nothing above says why, the $NODES machines have" \
      "not met at $HEAD: does each run this command, and is the port open?" >&2
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
    [ "$child" != "$BASHPID" ] || continue
    ! grep -qz '^RANK=' "/proc/$child/environ" 2>/dev/null || return 0
  done
  return 1
}
is_cut_off() { # any answer will do: a torchrun that is refused notices by itself
  [ "${NODES:-1}" -gt 1 ] || return 1
  local error host=${HEAD%:*}
  host=${host#[} host=${host%]}
  error=$(LC_ALL=C timeout 2 bash -c ": < /dev/tcp/$host/${HEAD##*:}" 2>&1)
  [ $? = 124 ] || [[ $error == *"No route"* || $error == *unreachable* || $error == *"timed out"* ]]
}
kill_torchrun() {
  kill -KILL $$ 2>/dev/null || return 0
  echo "error: torchrun on $(hostname) hangs and is killed: $1" >&2
}
watch &

exec torchrun "${meeting[@]}" --nproc_per_node="${RANKS:-gpu}" --max-restarts="${RESTARTS:-3}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m "dist_dcgan.${COMMAND:-train}" "$@"
