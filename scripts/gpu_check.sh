#!/usr/bin/env bash
# Ask a machine with an NVIDIA GPU what only a GPU can answer, in at most 460 s; with two GPUs in 180 s more.
#     bash scripts/gpu_check.sh                          # rows.jsonl, report.md and log.txt go to scripts/results/gpu/
#     bash scripts/gpu_check.sh --out DIR
#     bash scripts/gpu_check.sh --only classifier,tiles  # some parts again; their new rows replace the old ones
#     bash scripts/gpu_check.sh --wheels DIR             # wheels of packages that are missing, such as torchshard
#     bash scripts/gpu_check.sh --dry-run                # every part on the CPU, tiny sizes, in a temporary directory
# It uses the interpreter that choose_python of setup.sh chooses, and installs nothing. Each part is a process with a
# time limit, and writes its rows as it finds them. If a part fails, the others still run and the exit status is 1.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# NAME:SECONDS of each part, the most valuable answers first. They add up to more than the budget: few need all of
# theirs. Those with a & measure no time. They run beside one another and beside the next two, which do not either.
parts="machine:30 predict&:150 resume&:100 tests&:60 kernels:60 modes:90 classifier:110 step:60 largest:60 profile:50
    memory:40 backbone:60 tiles:45 save:45 compile:90 two:180"
out="" wheels="" only="" dry=()
flags="--out DIR, --wheels DIR, --only PART,PART and --dry-run"

# mistake WORDS: end with this error
mistake() {
    echo "error: $*" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case "$1" in
        --out | --wheels | --only) [ -n "${2:-}" ] || mistake "$1: give it a value; the flags are $flags" ;;&
        --out) out="$2"; shift 2 ;;
        --wheels) wheels="$2"; shift 2 ;;
        --only) only=",$2,"; shift 2 ;;
        --dry-run) dry=(--dry-run); shift ;;
        -h | --help) sed -n '2,/^set /{/^#/s/^# \?//p}' scripts/gpu_check.sh; exit ;;
        *) mistake "$1: unknown; the flags are $flags" ;;
    esac
done
for name in ${only//,/ }; do
    if [[ " ${parts//[&$'\n']/ }" != *" $name"[\ :]* ]]; then
        mistake "--only $name: unknown; the parts are $(echo $parts | sed 's/&*:[0-9]*//g')"
    fi
done
source scripts/setup.sh
choose_python
scratch="$(mktemp -d)"
running=""
trap 'kill $running $(jobs -p) 2> /dev/null || true; rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM
if [ -n "$wheels" ]; then
    # A wheel is an archive of what belongs on Python's path. Those of packages that are there stay packed.
    "$PYTHON" - "$wheels" "$scratch/packages" <<'END'
import importlib.metadata, pathlib, sys, zipfile

wheels = sorted(pathlib.Path(sys.argv[1]).glob("*.whl"))
if not wheels:
    sys.exit(f"error: --wheels {sys.argv[1]}: has no *.whl")
for wheel in wheels:
    try:
        importlib.metadata.version(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        try:
            zipfile.ZipFile(wheel).extractall(sys.argv[2])
        except (zipfile.BadZipFile, OSError) as error:
            sys.exit(f"error: --wheels {wheel}: cannot be unpacked ({error})")
        print(f"unpacked {wheel.name}")
END
    export PYTHONPATH="$scratch/packages${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ ${#dry[@]} -gt 0 ]; then export CUDA_VISIBLE_DEVICES=""; fi
if ! gpus="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')"; then
    mistake "$PYTHON cannot import torch; activate an environment that has it, or set PYTHON"
fi
budget=460
if [ ${#dry[@]} -gt 0 ]; then
    out="${out:-$(mktemp -d)}" gpus=2 budget=1800
elif [ "$gpus" = 0 ]; then
    mistake "PyTorch sees no GPU here: check nvidia-smi and CUDA_VISIBLE_DEVICES, or give --dry-run"
fi
if [ "$gpus" -lt 2 ] && [[ "$only" == *,two,* ]]; then
    mistake "--only two: needs two GPUs, and PyTorch sees $gpus"
fi
out="${out:-scripts/results/gpu}"
mkdir -p "$out"
out="$(realpath "$out")"

# note PART STATUS SECONDS WHY: a row about a part
note() {
    printf '{"question": "part", "case": "%s", "ok": %s, "seconds": %d, "failed": "%s"}\n' "$1" \
        "$([ "$2" = 0 ] && echo true || echo false)" "$3" "$4" >> "$out/rows.jsonl"
}

# part NAME SECONDS COMMAND...: run it within SECONDS, and within what is left of the budget. `timeout` ends what it
# started too: they are one process group. Output goes to a file, not through a pipe that a process could hold open.
part() {
    local name="$1" limit="$2" begun=$SECONDS left=$((budget - SECONDS)) status=0 why="" log="$scratch/$1.log"
    shift 2
    if [ -n "$only" ] && [[ "$only" != *",$name,"* ]]; then return; fi
    if [ ${#dry[@]} -gt 0 ]; then limit=600; fi
    if [ "$limit" -gt "$left" ]; then limit="$left"; fi
    printf '\n== %s\n+ %s\n' "$name" "$*" > "$log"
    if [ "$limit" -lt 5 ]; then
        status=1 why="no time was left"
    else
        timeout --kill-after=5 "$limit" "$@" >> "$log" 2>&1 &
        running=$!
        wait "$running" || status=$?  # not in the foreground, so that Ctrl-C ends it
        running=""
        case "$status" in
            0) ;;
            124 | 137) why="ran out of its $limit s" ;;
            *) why="exit status $status" ;;
        esac
    fi
    note "$name" "$status" $((SECONDS - begun)) "$why"
    printf '%4d s  %-12s%s\n' "$SECONDS" "$name" "$why"
    if [ "$status" != 0 ]; then
        echo "$name" >> "$scratch/failed"
        tail -n 8 "$log" | sed 's/^/        /'
    fi
    cat "$log" >> "$out/log.txt"
    "$PYTHON" scripts/gpu_report.py "$out" 2> /dev/null || true  # the last one, at the end, says why it fails
}

# question NAME SECONDS: of scripts/gpu_questions.py
question() {
    part "$1" "$2" "$PYTHON" scripts/gpu_questions.py "$1" --out "$out" "${dry[@]}"
}

for each in $parts; do
    name="${each%:*}" limit="${each#*:}"
    case "$name" in
        *\&)
            ( # A subshell has no traps: it needs its own to end what it runs.
                trap '[ -z "$running" ] || kill "$running" 2> /dev/null || true' EXIT
                trap 'exit 143' TERM
                question "${name%&}" "$limit"
            ) & ;;
        classifier) wait; question "$name" "$limit" ;;
        two)
            if [ "$gpus" -ge 2 ]; then
                budget=$((SECONDS + limit))
                question two "$limit"
            fi ;;
        *) question "$name" "$limit" ;;
    esac
done
wait
"$PYTHON" scripts/gpu_report.py "$out"
printf 'done in %d s: %s\n' "$SECONDS" "$out/report.md"
if [ -e "$scratch/failed" ]; then
    echo "failed: $(tr '\n' ' ' < "$scratch/failed")" >&2
    exit 1
fi
