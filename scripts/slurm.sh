#!/usr/bin/env bash
# Train on several nodes under Slurm. When the job is preempted or reaches its time limit, it saves and is requeued; it
# later continues where it stopped:
#     sbatch --nodes 4 --gpus-per-node 8 --time 24:00:00 scripts/slurm.sh [more flags of main.py]
# Settings come from environment variables, which sbatch passes on, or from the lines below. Submit it from the
# repository's directory.
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
BATCH_SIZE="${BATCH_SIZE:-512}"               # images per step and node, over its GPUs
OUTPUT="${OUTPUT:-runs/slurm}"                # shared by all nodes: a requeued job may get others
EXIT_SAVED=75                                 # main.py stopped by a signal and saved

: "${SLURM_JOB_ID:?submit this script with sbatch}"
source scripts/setup.sh  # Slurm runs a copy of this script, in the directory where it was submitted.
choose_python
# What keeps strangers out of the run; srun passes it on to all nodes.
export ARCFACE_SECRET="${ARCFACE_SECRET:-$(od -An -v -N32 -tx1 /dev/urandom | tr -d ' \n')}"
export MASTER_ADDR MASTER_PORT
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")  # the first node
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"  # jobs may share a node

# srun runs in the background, so that this shell can handle signals. Slurm sends them to this shell alone (B:): USR1
# three minutes before the time limit, TERM at a preemption. scancel passes them on to main.py on every node.
trap 'scancel --signal=USR1 "$SLURM_JOB_ID.0"' USR1 TERM

# From Slurm 22.05 on, srun gives each task one core unless --cpus-per-task says otherwise.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" --kill-on-bad-exit=0 \
    bash -c 'exec "$0" main.py "$@" --rank "$SLURM_NODEID"' "$PYTHON" "$DATA" \
    --multiprocessing-distributed --dist-url "tcp://$MASTER_ADDR:$MASTER_PORT" --world-size "$SLURM_JOB_NUM_NODES" \
    --enable-model-parallel --batch-size "$BATCH_SIZE" --num-classes "$NUM_CLASSES" \
    --workers "${SLURM_CPUS_PER_TASK:-8}" --output "$OUTPUT" --resume auto "$@" &
srun=$!

# A trapped signal interrupts `wait`, whose status then is not srun's. Once srun has ended, the shell remembers its status.
while kill -0 "$srun" 2> /dev/null; do
    wait "$srun" || true
done
wait "$srun" && status=0 || status=$?
if [ "$status" -eq "$EXIT_SAVED" ]; then
    echo "saved; the job goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
