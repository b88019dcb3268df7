#!/usr/bin/env bash
# Submit what a data set and a run need under SLURM: conversion, training, scoring, each once the one before has succeeded.
#   bash launch/submit.sh [--dry-run] DATA RUN_DIR SOURCE [OPTIONS] [-- OPTIONS OF TRAINING [-- OPTIONS OF SCORING]]
#   PARTS=8 TRAIN="--nodes=2" bash launch/submit.sh /scratch/bedroom_train runs/bedrooms bedroom_train_lmdb -- --epochs 10
# PARTS: jobs that share the conversion (1), or 8%2, two of eight at a time; none is submitted where DATA is complete.
# CONVERT, TRAIN, EVALUATE: options of sbatch for these jobs; for all of them SLURM reads SBATCH_PARTITION, SBATCH_ACCOUNT and the like. --dry-run prints what
# would be submitted.
set -euo pipefail

dry_run=
[ "${1:-}" != --dry-run ] || { dry_run=yes; shift; }
if [ $# -lt 3 ]; then
  echo "usage: bash launch/submit.sh [--dry-run] DATA RUN_DIR SOURCE [OPTIONS] [-- OPTIONS OF TRAINING [-- OPTIONS OF SCORING]]" >&2
  exit 2
fi
data=$1 run_dir=$2
shift 2
conversion=() training=() scoring=()
part=0
for word; do
  if [ "$word" = -- ]; then
    part=$((part + 1))
  else
    case $part in
      0) conversion+=("$word") ;;
      1) training+=("$word") ;;
      *) scoring+=("$word") ;;
    esac
  fi
done
[ -f launch/train.sbatch ] || { echo "error: no launch/train.sbatch in $PWD: run it from the repository's root" >&2; exit 2; }

python -m dist_dcgan.run.directory ${training[@]+"${training[@]}"} >/dev/null # a mistake is found now, not hours later

# Submits a job with a name for --dry-run; the number of the job is left in `job`.
submit() {
  local name=$1
  shift
  local command=(sbatch --parsable --kill-on-invalid-dep=yes "$@")
  if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}" && echo
    job="<$name>"
  else
    job=$("${command[@]}")
    job=${job%%;*} # the name of a cluster may follow
    echo "submitted $job: $name"
  fi
}

after=()
# shellcheck disable=SC2086  # options are several words
if [ ! -f "$data/manifest.json" ]; then
  if [ "${PARTS:-1}" != 1 ]; then
    submit convert --export=ALL,MERGE=no --array="1-$PARTS" ${CONVERT:-} launch/convert.sbatch "${conversion[@]}" --out "$data"
    submit merge --dependency="afterok:$job" --job-name=dist_dcgan-merge --time=1:00:00 ${CONVERT:-} \
      --wrap "${CONTAINER:-} python -m shards merge $(printf %q "$data")"
  else
    submit convert ${CONVERT:-} launch/convert.sbatch "${conversion[@]}" --out "$data"
  fi
  after=(--dependency="afterok:$job")
fi
# shellcheck disable=SC2086
submit train ${after[@]+"${after[@]}"} ${TRAIN:-} launch/train.sbatch --data "$data" --run-dir "$run_dir" \
  ${training[@]+"${training[@]}"}
# shellcheck disable=SC2086
submit evaluate --dependency="afterok:$job" --output="$run_dir/evaluation.txt" ${EVALUATE:-} \
  launch/evaluate.sbatch "$run_dir" --data "$data" ${scoring[@]+"${scoring[@]}"}
