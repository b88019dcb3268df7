#!/usr/bin/env bash
# Train on the GPUs of this machine; all arguments are passed to dist_dcgan.train.
#   bash launch/torchrun.sh --data data/bedroom_train --run-dir runs/bedrooms
# On several machines, run the same command on each, with their number and a free port on one of them:
#   NODES=2 HEAD=host1:29400 bash launch/torchrun.sh --data data/bedroom_train --run-dir runs/bedrooms
# RANKS: processes per machine, by default one per GPU; give it if there is none. RESTARTS: how often failed ranks are
# restarted, from the newest checkpoint. LOGS: folder for the output of each rank, which is then also printed here with
# the rank as prefix.
# JOB: a name shared by the machines and unique to the run. COMMAND: doctor, evaluate or sample instead of train.
set -euo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100} # seconds to save a checkpoint after a signal

launch=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
fail() { echo "error: $1" >&2 && exit 2; }
command -v torchrun >/dev/null || fail "no torchrun: activate the environment of dist_dcgan"
for name in "${!PET_@}" "${!TORCH@}"; do
  [ -n "${!name}" ] || unset "$name" # torchrun takes an empty value for a wrong one
done
if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
  exec python "$launch/run_module.py" "dist_dcgan.${COMMAND:-train}" --help
fi
[[ ${NODES:-1} =~ ^[1-9][0-9]*$ ]] || fail "NODES=$NODES: it must be a number of machines"
[[ ${RESTARTS:-3} =~ ^[0-9]+$ ]] || fail "RESTARTS=$RESTARTS: it must be a number"
[[ ${RANKS:-gpu} =~ ^([1-9][0-9]*|gpu|cpu|auto)$ ]] || fail "RANKS=$RANKS: it must be a number of processes"
if [ "${RANKS:-gpu}" = gpu ]; then
  # without the working directory, which Python searches first, as ''
  RANKS=$(python -c 'import sys; sys.path = list(filter(None, sys.path)); import torch; print(torch.cuda.device_count())')
  [ "$RANKS" != 0 ] || fail "torch sees no GPU on $(uname -n): RANKS=2 trains with two processes on the CPU"
fi
# On one machine torchrun keeps its state in a private file, since any user could run code through its port. The machine
# need not resolve its own name.
private=
if [ "${NODES:-1}" = 1 ]; then
  folder=${TMPDIR:-/tmp}
  [ -w "$folder" ] || folder=/tmp # a container may not show a node's own
  private=$(mktemp -d "$folder/dist_dcgan-torchrun.XXXXXXXX")
  meeting=(--rdzv-backend=c10d --rdzv-endpoint="$private/store" --rdzv-conf=store_type=file --local-addr=localhost)
  DIST_DCGAN_SECRET=$(od -An -tx1 -N16 /dev/urandom | tr -d ' \n') # so that others cannot foretell where its ranks meet
  export DIST_DCGAN_SECRET TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
else
  [[ ${HEAD:-} =~ ^.+:[0-9]+$ ]] || fail "NODES=$NODES, HEAD=${HEAD:-}: they meet at HEAD=HOST:PORT"
  meeting=(--nnodes="$NODES" --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${JOB:-dist_dcgan}")
fi
if [ -n "${LOGS:-}" ]; then
  meeting+=(--log-dir="$LOGS/$(uname -n)" --tee=3)
  # shellcheck disable=SC2016  # torchrun substitutes ${rank}
  export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
fi

# Monitors torchrun, which replaces this script by exec and so keeps the process id $$. Prints an error if the rendezvous
# failed; kills torchrun if its ranks have ended and it hangs because the network or another machine is lost. Removes its
# file at the end.
watch() {
  local without=0 cut=0 started=
  trap '' TERM INT HUP QUIT USR1 PIPE
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
  [ -z "$private" ] || rm -rf "$private"
  if [ -z "$started" ] && [ "${NODES:-1}" -gt 1 ]; then
    echo "error: torchrun on $(uname -n) ended before it started ranks: if nothing above says why, the $NODES machines have" \
      "not met at $HEAD: does each run this command, and is the port open?" >&2
  fi
}
is_child() { # false after torchrun has ended, even if it is a zombie
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
is_cut_off() { # false for any answer, also "refused", which torchrun handles itself
  [ "${NODES:-1}" -gt 1 ] || return 1
  local error host=${HEAD%:*}
  host=${host#[} host=${host%]}
  error=$(LC_ALL=C timeout 2 bash -c ": < /dev/tcp/$host/${HEAD##*:}" 2>&1)
  [ $? = 124 ] || [[ $error == *"No route"* || $error == *unreachable* || $error == *"timed out"* ]]
}
kill_torchrun() {
  kill -KILL $$ 2>/dev/null || return 0
  echo "error: torchrun on $(uname -n) hangs and is killed: $1" >&2
}
watch &

signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
[ -n "$(trap -p HUP)" ] || signals+=,SIGHUP # ignored under nohup, and stays so

exec torchrun "${meeting[@]}" --nproc_per_node="$RANKS" --max-restarts="${RESTARTS:-3}" \
  --signals-to-handle "$signals" \
  "$launch/run_module.py" "dist_dcgan.${COMMAND:-train}" "$@"
