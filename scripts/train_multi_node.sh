#!/usr/bin/env bash
# Train on several nodes with sharded class centers. Run this on every node with its rank:
#     MASTER_ADDR=172.20.10.22 bash scripts/train_multi_node.sh 0 [more flags of main.py]
#     MASTER_ADDR=172.20.10.22 bash scripts/train_multi_node.sh 1 [the same flags]
set -euo pipefail

if [[ ! "${1:-}" =~ ^[0-9]+$ ]]; then
    echo "usage: bash scripts/train_multi_node.sh NODE_RANK [flags of main.py]    (NODE_RANK: 0, 1, ...)" >&2
    exit 2
fi
NODE_RANK="$1"
shift

DATA="${DATA:-data/ms1m}"                     # training images, the same on every node
NUM_CLASSES="${NUM_CLASSES:-4000000}"
BATCH_SIZE="${BATCH_SIZE:-128}"               # images per step and node, over its GPUs
NNODES="${NNODES:-2}"
MASTER_ADDR="${MASTER_ADDR:-172.20.10.22}"    # address of node 0
MASTER_PORT="${MASTER_PORT:-12355}"           # a free port there
OUTPUT="${OUTPUT:-runs/multi_node}"           # of node 0, where all checkpoints are; other nodes may share it
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0,1,2,3,4,5,6,7}"
# export NCCL_SOCKET_IFNAME=ens1f1 GLOO_SOCKET_IFNAME=ens1f1    # the interface between the nodes, if it is not found

data="$(realpath -m "$DATA")" output="$(realpath -m "$OUTPUT")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
choose_python
exec "$PYTHON" main.py "$data" \
    --multiprocessing-distributed --dist-url "tcp://$MASTER_ADDR:$MASTER_PORT" \
    --enable-model-parallel --model-parallel-dim 1 \
    --batch-size "$BATCH_SIZE" --num-classes "$NUM_CLASSES" \
    --world-size "$NNODES" --rank "$NODE_RANK" \
    --output "$output" \
    "$@"
