#!/usr/bin/env bash
# Train on several nodes under Slurm; a job that is preempted, or comes to its time limit, saves, goes back into the queue, and
# continues where it stopped:
#     sbatch --nodes 4 --gpus-per-node 8 --time 24:00:00 scripts/slurm.sh [more flags of main.py]
# Settings come from the environment (sbatch passes it on) or from the lines below. Start it in the repository's directory.
#SBATCH --job-name=arcface
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=arcface-%j.log
set -euo pipefail

DATA="${DATA:-data/ms1m}"                     # training images, the same on every node
NUM_CLASSES="${NUM_CLASSES:-4000000}"
BATCH_SIZE="${BATCH_SIZE:-512}"               # images per step of one node, over its GPUs
OUTPUT="${OUTPUT:-runs/slurm}"                # a directory that all nodes share
PYTHON="${PYTHON:-python3}"
EXIT_SAVED=75                                 # main.py: stopped by a signal, and saved

: "${SLURM_JOB_ID:?start this script with sbatch, not with bash}"
export MASTER_ADDR MASTER_PORT
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")  # the first
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"  # two jobs may share a node

# In the background, so that this shell can answer the signals, which Slurm sends to it alone (B:): USR1 three minutes before
# the time limit, TERM at a preemption. Each node's main.py gets them through srun.
# Without --cpus-per-task srun of Slurm 22.05 and newer gives each task one core.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" --kill-on-bad-exit=0 bash -c 'exec "$0" main.py "$@" --rank "$SLURM_NODEID"' "$PYTHON" "$DATA" \
    --multiprocessing-distributed --dist-url "tcp://$MASTER_ADDR:$MASTER_PORT" --world-size "$SLURM_JOB_NUM_NODES" \
    --enable-model-parallel --batch-size "$BATCH_SIZE" --num-classes "$NUM_CLASSES" --workers "${SLURM_CPUS_PER_TASK:-8}" \
    --output "$OUTPUT" --resume auto "$@" &
srun=$!
trap 'scancel --signal=USR1 "$SLURM_JOB_ID.0"' USR1 TERM

# A trapped signal ends `wait`, not srun.
status=0
while true; do
    wait "$srun" && status=0 || status=$?
    kill -0 "$srun" 2> /dev/null || break
done
if [ "$status" -eq "$EXIT_SAVED" ]; then
    echo "saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
