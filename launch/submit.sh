#!/usr/bin/env bash
# Submit conversion, training and scoring to SLURM; each job starts after the previous one has succeeded.
#   bash launch/submit.sh [--dry-run] DATA RUN_DIR SOURCE [OPTIONS] [-- OPTIONS OF TRAINING [-- OPTIONS OF SCORING]]
#   PARTS=8 TRAIN="--nodes=2" bash launch/submit.sh /scratch/bedroom_train runs/bedrooms bedroom_train_lmdb -- --epochs 10
# PARTS: number of conversion jobs (default 1), or 8%2 for two of eight at a time; no job is submitted if DATA is complete.
# CONVERT, TRAIN, EVALUATE: sbatch options of these jobs; SBATCH_PARTITION, SBATCH_ACCOUNT etc. apply to all of them.
# --dry-run prints the commands instead of submitting them.
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
launch=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
quoted() { local escaped=${1//\'/\'\\\'\'} && printf "'%s'" "$escaped"; } # for sh, which does not know all of %q

# Reports invalid arguments, and a run directory of somebody else, before the conversion.
python "$launch/run_module.py" dist_dcgan.run.directory --data "$data" --run-dir "$run_dir" ${training[@]+"${training[@]}"} >/dev/null
scores=$run_dir/evaluation.txt # SLURM appends to it, also through a link
if [ -L "$scores" ] || { [ -e "$scores" ] && [ ! -f "$scores" ]; }; then
  echo "error: $scores, to which scores are appended, is a link or no plain file: remove it" >&2
  exit 2
fi

# Submits a job and sets `job` to its number; $1 is the name shown in its place with --dry-run.
submit() {
  local name=$1
  shift
  local command=(sbatch --parsable --kill-on-invalid-dep=yes "$@")
  if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}" && echo
    job="<$name>"
  else
    job=$("${command[@]}")
    job=${job%%;*} # sbatch may append ;CLUSTER
    echo "submitted $job: $name"
  fi
}

after=()
# shellcheck disable=SC2086  # options are several words
if [ ! -f "$data/manifest.json" ]; then
  if [ "${PARTS:-1}" != 1 ]; then
    submit convert --export=ALL,MERGE=no --array="1-$PARTS" ${CONVERT:-} "$launch/convert.sbatch" "${conversion[@]}" --out "$data"
    submit merge --dependency="afterok:$job" --job-name=dist_dcgan-merge --time=1:00:00 ${CONVERT:-} \
      --wrap "${CONTAINER:-} python $(quoted "$launch/run_module.py") shards merge $(quoted "$data")"
  else
    submit convert ${CONVERT:-} "$launch/convert.sbatch" "${conversion[@]}" --out "$data"
  fi
  after=(--dependency="afterok:$job")
fi
# shellcheck disable=SC2086
submit train ${after[@]+"${after[@]}"} ${TRAIN:-} "$launch/train.sbatch" --data "$data" --run-dir "$run_dir" \
  ${training[@]+"${training[@]}"}
# shellcheck disable=SC2086
submit evaluate --dependency="afterok:$job" --output="$scores" ${EVALUATE:-} \
  "$launch/evaluate.sbatch" "$run_dir" --data "$data" ${scoring[@]+"${scoring[@]}"}
