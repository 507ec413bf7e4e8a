#!/usr/bin/env bash
# On a GPU machine with PyTorch: what is not proven without a GPU, in order, each part with a time limit of its own.
#
#   bash gpu/run.sh                     all parts
#   bash gpu/run.sh tests speed         some of them
#
# Results are in $OUT (default: gpu-results): summary.json, a log and JSON for each part, results.tar.gz with pictures.
set -eu
cd "$(dirname "$0")/.."
place=${GPU_PLACE:-/tmp/trainer-gpu}
mkdir -p "$place/site" "$place/data"
if [ -d .gpu ] && [ ! -e "$place/.done" ]; then
  python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$place/site" .gpu/wheels/*.whl
  for archive in .gpu/data/*.tar.xz; do tar -C "$place/data" -xJf "$archive" & done
  if [ -e .gpu/data/judges.tar ]; then mkdir -p runs && tar -C runs -xf .gpu/data/judges.tar; fi
  wait
  touch "$place/.done"
fi
export PYTHONPATH="$place/site${PYTHONPATH:+:$PYTHONPATH}" TRAINER_DATA="${TRAINER_DATA:-$place/data}"
export PYTORCH_NVML_BASED_CUDA_CHECK=1  # looking for a GPU must not take it from processes that are forked later
export TRAINER_WANDB__MODE=${TRAINER_WANDB__MODE:-disabled} PYTHONDONTWRITEBYTECODE=1
exec python3 -m gpu --out "${OUT:-gpu-results}" "$@"
