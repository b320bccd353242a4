#!/usr/bin/env bash
# Train on all GPUs of this machine with sharded class centers. Settings come from environment variables; arguments are
# passed on to main.py:
#     DATA=data/ms1m NUM_CLASSES=85744 bash scripts/train_single_node.sh --enable-amp-mode
set -euo pipefail

DATA="${DATA:-data/ms1m}"               # training images, DATA/<identity>/*.jpg
NUM_CLASSES="${NUM_CLASSES:-85744}"     # at least the number of identities
BATCH_SIZE="${BATCH_SIZE:-512}"         # images per step, over all GPUs
OUTPUT="${OUTPUT:-runs/single_node}"    # checkpoint.pth.tar, metrics.jsonl
# export CUDA_VISIBLE_DEVICES=0,1,2,3   # to use only some of the GPUs

data="$(realpath -m "$DATA")" output="$(realpath -m "$OUTPUT")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
choose_python
exec "$PYTHON" main.py "$data" \
    --multiprocessing-distributed \
    --enable-model-parallel --model-parallel-dim 1 \
    --batch-size "$BATCH_SIZE" --num-classes "$NUM_CLASSES" \
    --output "$output" \
    "$@"
