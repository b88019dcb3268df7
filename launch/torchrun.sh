#!/usr/bin/env bash
# Train on the GPUs of this machine; every argument goes to dist_dcgan.train.
#   bash launch/torchrun.sh --data data/bedroom_train --run-dir runs/bedrooms
# RANKS: processes to start, one per GPU by default.
set -euo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100} # seconds to save after a signal
exec torchrun --standalone --nproc_per_node="${RANKS:-gpu}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  -m dist_dcgan.train "$@"
