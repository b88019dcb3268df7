#!/usr/bin/env bash
# Install, render demo data, train and sample, on a machine with Python and pip; some ten minutes on 2 CPU cores after the
# installation. If interrupted, rerun it to resume.
set -euo pipefail
if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
  sed -n '2,3s/^# //p' "$0"
  echo "Arguments are passed to dist_dcgan.train. VENV: folder of the environment, .venv by default."
  exit
fi
cd "$(dirname "$0")/.."

venv=$(realpath -m "${VENV:-.venv}")
data=data/demo_train
run=runs/quickstart
picture=$run/bedrooms.png

echo "== 1/5  install into $venv"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -e ".[eval]"
export PATH="$venv/bin:$PATH"

echo "== 2/5  render bedrooms in LSUN's format: data/demo_train_lmdb"
[ -d data/demo_train_lmdb ] || python -m shards demo --out data

echo "== 3/5  convert to shards: $data"
[ -f $data/manifest.json ] || python -m shards convert data/demo_train_lmdb --out $data --samples-per-shard 500

# One process: on one GPU, else with a thread per core, at most 8. Its batches of 16 are too small for several: two threads
# make 78 images/s, and two processes 50.
cores=$(OMP_NUM_THREADS='' nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 8 ? cores : 8))}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that spin while they wait starve on a machine that is busy

echo "== 4/5  train: $run"
RANKS=1 bash launch/torchrun.sh \
  --preset quickstart --data $data --run-dir $run "$@"

echo "== 5/5  sample: $picture"
rm -f $picture
python -m dist_dcgan.sample $run --out $picture
python -m dist_dcgan.report $run --out $run/report.html

echo
echo "Generated bedrooms:  $PWD/$picture"
echo "Grids over time:     $PWD/$run/samples/"
echo "The whole run:       $PWD/$run/report.html"
echo "Generator:           $PWD/$run/generator_ema.safetensors"
echo "Go on by hand:       cd '$PWD' && . '$venv/bin/activate', then: python -m dist_dcgan.sample $run --out more.png --seeds 64-127"
