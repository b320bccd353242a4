#!/usr/bin/env bash
# Kill a training run of two processes with SIGKILL again and again, every other time while it saves, and restart it
# with the same command, --resume auto. In the end, weights and momentum must equal those of an uninterrupted run, bit for bit.
#     bash scripts/kill_test.sh                # 20 kills, some minutes
#     KILLS=3 bash scripts/kill_test.sh
#     NODES=2 bash scripts/kill_test.sh        # two nodes without a shared directory; some kills hit one of them only
#     bash scripts/kill_test.sh --sample-rate 0.3    # with more flags of main.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_environment requirements.txt

KILLS="${KILLS:-20}"
NODES="${NODES:-1}"  # 1 or 2
STEPS="${STEPS:-$((8 * KILLS))}"  # more than it does before it is killed for the last time

flags=("$@")
scratch="$(mktemp -d)"
runs=()
trap 'for run in "${runs[@]}"; do kill -KILL -- "-$run" 2> /dev/null || true; done; rm -rf "$scratch"' EXIT
"$PYTHON" scripts/synthesize.py "$scratch/faces" --identities 8 --images 6 --pairs 2 --pair-identities 2 > /dev/null

# Starts each node in a process group of its own: what kills the group kills parent, ranks and loading processes at once.
start() {
    local output="$1" port node
    shift
    runs=()
    port="$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
    for ((node = 0; node < NODES; node++)); do
        setsid "$PYTHON" main.py "$scratch/faces" --multiprocessing-distributed --nproc-per-node "$((2 / NODES))" \
            --device cpu --world-size "$NODES" --rank "$node" --dist-url "tcp://127.0.0.1:$port" --enable-model-parallel \
            -a mobilefacenet --num-classes 11 -b "$((4 / NODES))" -j 2 --epochs 999 --lr-milestones none --seed 1 \
            --max-steps "$STEPS" --output "$output" "${flags[@]}" "$@" >> "$scratch/log" 2>&1 &
        runs+=($!)
        output="$scratch/none"  # the other node neither has nor makes a directory
    done
}
running() { kill -0 "${runs[0]}" 2> /dev/null; }
finish() {
    for run in "${runs[@]}"; do
        if ! wait "$run"; then
            tail -n 20 "$scratch/log" >&2
            exit 1
        fi
    done
    runs=()
}
# A save is under way: there is an unfinished checkpoint, and not only the rest of the save that was killed last.
unfinished() { stat -c %n-%y "$scratch"/killed/checkpoints/*.part 2> /dev/null || true; }
saving() { compgen -G "$scratch/killed/checkpoints/*.part" > /dev/null && [ "$(unfinished)" != "$rest" ]; }
pause() { read -rt "$1" <> <(:) || true; }  # sleeps without a process

kills=0 inside=0 started=$SECONDS
while [ "$kills" -lt "$KILLS" ]; do
    rest="$(unfinished)"
    start "$scratch/killed" --resume auto --save-freq 1
    if [ $((kills % 2)) = 0 ]; then  # in one of its saves
        for ((save = RANDOM % 3; save >= 0; save--)); do
            while saving && running; do pause 0.002; done
            while ! saving && running; do pause 0.002; done
        done
        pause "0.$(printf '%03d' $((RANDOM % 60)))"
    else  # at any moment, also while it starts
        pause "$((RANDOM % 20)).$((RANDOM % 10))"
    fi
    running || break  # it has come to its end
    victims=("${runs[@]}")
    if [ $((kills % 4)) = 2 ]; then victims=("${runs[RANDOM % NODES]}"); fi  # the other node ends by itself
    for run in "${victims[@]}"; do kill -KILL -- "-$run" 2> /dev/null || true; done
    for run in "${runs[@]}"; do wait "$run" 2> /dev/null || true; done
    if saving; then inside=$((inside + 1)); fi
    kills=$((kills + 1))
    newest="$(readlink "$scratch/killed/checkpoint.pth.tar" || echo none)"
    printf 'kill %d, %d of them inside a save; newest checkpoint: %s\n' "$kills" "$inside" "$newest"
done
start "$scratch/killed" --resume auto --save-freq 1
finish
start "$scratch/whole"
finish
"$PYTHON" - "$scratch" <<'END'
import sys
from pathlib import Path

sys.path[:0] = [".", "tests"]
from helpers.saved import assert_same_training

assert_same_training(Path(sys.argv[1], "killed"), Path(sys.argv[1], "whole"))
END
[ ! -e "$scratch/none" ]
echo "$kills kills of $NODES node(s), $inside of them inside a save, $STEPS steps: the weights equal those of the uninterrupted run bit for bit" \
    "($((SECONDS - started)) s)"
