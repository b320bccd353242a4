#!/usr/bin/env bash
# The whole workflow in a few minutes: draw synthetic faces, train on them with sharded class centers (one process per
# GPU, or two on the CPU), validate on pairs of unseen people, plot the curves. It can be run again.
#     bash scripts/demo.sh                       # writes below demo/
#     DEMO_DIR=/tmp/demo bash scripts/demo.sh
set -euo pipefail

demo="$(realpath -m "${DEMO_DIR:-$(dirname "${BASH_SOURCE[0]}")/../demo}")"
IDENTITIES=150 IMAGES=20 PAIRS=600 PAIR_IDENTITIES=60
EPOCHS=1

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_environment requirements.txt
started=$SECONDS

step() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); }
run() {
    echo "+ $*"
    "$@"
}

# Replace the results of an earlier demo, but nothing else.
results="$demo/results"
if [ -e "$results" ] && [ ! -e "$results/made-by-demo" ]; then
    echo "error: $results was not written by this demo; set DEMO_DIR to another directory" >&2
    exit 2
fi
rm -rf "$results"
mkdir -p "$results"
touch "$results/made-by-demo"

gpus="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
processes=$((gpus > 0 ? gpus : 2))
per_process=$((processes == 1 ? 32 : 16))

step "1/5 synthetic faces"
run "$PYTHON" scripts/synthesize.py "$demo/data" --identities $IDENTITIES --images $IMAGES \
    --pairs $PAIRS --pair-identities $PAIR_IDENTITIES --force

step "2/5 training: $processes processes, sharded classes"
run "$PYTHON" main.py "$demo/data" --multiprocessing-distributed --nproc-per-node $processes \
    --dist-url tcp://127.0.0.1:0 --enable-model-parallel --model-parallel-dim 1 \
    -a mobilefacenet --num-classes $IDENTITIES --batch-size $((per_process * processes)) --workers $processes \
    --epochs $EPOCHS --lr 0.1 --warmup-epochs 0.1 --lr-milestones 0.6,0.85 --wd 5e-4 --margin 0.1 --scale 16 \
    --augment standard --seed 0 --print-freq 5 --output "$results"

pairs=(--imgs-root "$demo/data/lfw/imgs" --pair-list "$demo/data/lfw/pair.list" --batch-size 64 --workers 2)
step "3/5 validation of the untrained network on unseen people"
run "$PYTHON" valid.py "${pairs[@]}" --untrained -a mobilefacenet --json "$results/untrained.json"

step "4/5 validation of the trained network on the same pairs"
run "$PYTHON" valid.py "${pairs[@]}" --resume "$results/checkpoint.pth.tar" --json "$results/trained.json" \
    --report "$results/report"

step "5/5 plots"
run "$PYTHON" scripts/plot.py --metrics "$results/metrics.jsonl" --output "$results/curve.png"
run "$PYTHON" scripts/plot.py --roc "$results/trained.json=trained" --roc "$results/untrained.json=untrained" \
    --output "$results/roc.png"

step "done"
"$PYTHON" - "$results" <<'END'
import json, sys
untrained, trained = (json.load(open(f"{sys.argv[1]}/{name}.json"))["accuracy"] for name in ("untrained", "trained"))
print(f"accuracy on pairs of unseen people: {untrained:.1%} untrained -> {trained:.1%} trained (guessing: 50%)")
END
cat <<END
training curve  $results/curve.png
ROC             $results/roc.png
report          $results/report/report.html
checkpoint      $results/checkpoint.pth.tar
faces           $demo/data/train

Next, train on your own faces: aligned, 112x112, one directory per person. For example:
    ${ARCFACE_VENV:+ARCFACE_VENV=${ARCFACE_VENV@Q} }DATA=data/ms1m NUM_CLASSES=85744 bash scripts/train_single_node.sh
END
