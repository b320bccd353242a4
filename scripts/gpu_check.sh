#!/usr/bin/env bash
# Check a machine with an NVIDIA GPU in under 8 minutes: run the CUDA tests, both benchmarks at sizes that fill the
# chip, 200 steps of IResNet-50 in each precision, and the largest number of classes that trains on one GPU.
#     bash scripts/gpu_check.sh                      # rows and logs go to scripts/results/
#     bash scripts/gpu_check.sh --out DIR
# It uses the interpreter that choose_python of setup.sh chooses if that has the packages, or creates a virtual
# environment. If a part fails, the others still run and the exit status is 1.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=scripts/results
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out="${2:?--out: give a directory}"; shift 2 ;;
        *) echo "error: $1: unknown; the only flag is --out DIR" >&2; exit 2 ;;
    esac
done
source scripts/setup.sh
choose_python
if ! "$PYTHON" -c 'import torch, torchvision, torchshard, pytest' 2>/dev/null; then
    setup_environment requirements.txt tests/requirements.txt
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: PyTorch sees no GPU here: check nvidia-smi and CUDA_VISIBLE_DEVICES" >&2
    exit 2
fi
mkdir -p "$out"
out="$(realpath "$out")"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
started=$SECONDS
failed=()

# part NAME SECONDS COMMAND...: run it within SECONDS; its output goes to the screen and to NAME.log
part() {
    local name="$1" limit="$2"
    shift 2
    printf '\n== %s (%d s)\n+ %s\n' "$name" $((SECONDS - started)) "$*"
    if ! timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"; then
        echo "!! $name failed or ran out of its $limit s"
        failed+=("$name")
    fi
}

"$PYTHON" -c 'import torch; p = torch.cuda.get_device_properties(0)
print(p.name, f"{p.total_memory / 2**30:.0f} GiB, L2 {p.L2_cache_size / 2**20:.0f} MiB, torch", torch.__version__)' | tee "$out/gpu.txt"

part cuda-tests 200 env ARCFACE_TEST_CUDA=1 "$PYTHON" -m pytest -q tests/test_cuda.py --maxfail=5

# The classifier. The benchmark reports torchshard's form as out of memory where its ten (N, C) matrices do not fit.
for size in "85744 512" "85744 1024" "1000000 512" "1000000 1024" "4000000 1024"; do
    read -r classes batch <<< "$size"
    part "bench-classifier-$classes-$batch" 60 "$PYTHON" scripts/bench_classifier.py --classes "$classes" --batch "$batch" \
        --steps 10 --operands bf16 --csv "$out/classifier_cuda.csv"
done
part bench-classifier-1000000-1024-recompute 60 "$PYTHON" scripts/bench_classifier.py --classes 1000000 --batch 1024 --steps 10 \
    --operands bf16 --impl fused --classifier-memory-mib 0 --csv "$out/classifier_cuda.csv"

# The most classes whose centers and momentum, 4096 bytes per class, fit into nine tenths of the memory.
largest="$("$PYTHON" -c 'import torch; print(int(torch.cuda.mem_get_info()[0] * 0.9) // 4096 // 1000000 * 1000000)')"
part "bench-classifier-largest" 60 "$PYTHON" scripts/bench_classifier.py --classes "$largest" --batch 512 --steps 3 \
    --operands bf16 --impl fused --update --csv "$out/classifier_cuda.csv"

# The whole step, compared with that of the published script.
part bench-step-bf16 90 "$PYTHON" scripts/bench_step.py -a iresnet50 --classes 85744 --batch 256 --precision bf16 --channels-last \
    --steps 20 --csv "$out/step_cuda.csv"
part bench-step-fp32 90 "$PYTHON" scripts/bench_step.py -a iresnet50 --classes 85744 --batch 256 --precision fp32 \
    --steps 12 --csv "$out/step_cuda.csv"

# Training from images on disk. The logs have images/s and losses.
"$PYTHON" scripts/synthesize.py "$scratch/faces" --identities 128 --images 16 --pairs 20 --pair-identities 4 > /dev/null
train=("$PYTHON" main.py "$scratch/faces" -a iresnet50 --enable-model-parallel --num-classes 85744 -b 256 -j 8 --max-steps 200 \
    --epochs 100 --lr 0.02 --print-freq 50 --no-save --seed 0 --device cuda)
part train-fp32 100 "${train[@]}" --output "$scratch/fp32"
part train-bf16 60 "${train[@]}" --enable-amp-mode --amp-dtype bf16 --channels-last --output "$scratch/bf16"
part train-fp16 60 "${train[@]}" --enable-amp-mode --amp-dtype fp16 --channels-last --output "$scratch/fp16"
part train-largest 120 "$PYTHON" main.py "$scratch/faces" -a iresnet50 --enable-model-parallel --fuse-classifier-update \
    --classifier-memory-mib 0 --num-classes "$largest" -b 64 -j 8 --max-steps 3 --print-freq 1 --no-save --seed 0 --device cuda \
    --enable-amp-mode --amp-dtype bf16 --output "$scratch/largest"

printf '\n== done in %d s: %s\n' $((SECONDS - started)) "$out"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
