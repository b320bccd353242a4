#!/usr/bin/env bash
# Train with two processes for ten minutes, saving every 10 steps and evaluating every 20, and record memory, descriptors,
# threads and processes of the run, and /dev/shm. Fails if one of them grows: from the second and third fifth of the time to
# the last two. The run ends with SIGTERM, and must save.
#     bash scripts/soak_test.sh                # 600 seconds
#     bash scripts/soak_test.sh 120
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
setup_environment requirements.txt

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
"$PYTHON" scripts/synthesize.py "$scratch/faces" --identities 8 --images 24 --pairs 60 --pair-identities 8 > /dev/null

"$PYTHON" - "${1:-600}" "$scratch" <<'END'
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

seconds, scratch = float(sys.argv[1]), Path(sys.argv[2])
COMMAND = f"""main.py {scratch}/faces --device cpu --multiprocessing-distributed --nproc-per-node 2 --enable-model-parallel
    --dist-url tcp://127.0.0.1:0 -a mobilefacenet -b 4 -j 2 --num-classes 5000 --epochs 100000 --lr 0.01 -p 10
    --lr-milestones none --seed 1 --save-freq 10 --val-pairs {scratch}/faces/lfw/pair.list --val-freq 20 --output {scratch}/run"""
PARTS = 5  # of the time; the first one is for warming up


def descendants(process: int) -> list[int]:
    children = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            children += map(int, path.read_text().split())
        except OSError:  # it has ended
            continue
    return [process, *(one for child in children for one in descendants(child))]


def sample(run: int) -> dict[str, float]:
    """Sums over the processes of the run. PSS: shared pages count once."""
    found = {"memory (PSS), MiB": 0.0, "descriptors": 0, "threads": 0, "processes": 0}
    for process in descendants(run):
        try:
            memory = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.M)
            counts = len(os.listdir(f"/proc/{process}/fd")), len(os.listdir(f"/proc/{process}/task"))
        except OSError:  # it has ended
            continue
        for name, value in zip(found, (int(memory[1]) / 1024 if memory else 0, *counts, 1)):
            found[name] += value
    room = os.statvfs("/dev/shm")
    return {**found, "/dev/shm, KiB": (room.f_blocks - room.f_bfree) * room.f_frsize / 1024}


with open(scratch / "log", "w") as log:
    run = subprocess.Popen([sys.executable, *COMMAND.split()], stdout=log, stderr=log, start_new_session=True)
begun, samples = time.monotonic(), []
try:
    while (passed := time.monotonic() - begun) < seconds and run.poll() is None:
        if "step 20/" in (scratch / "log").read_text():  # it trains, has saved and evaluated
            samples.append((passed, sample(run.pid)))
        elif not samples:
            begun = max(begun, time.monotonic() - 1)  # the time counts from then on
        time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    status = run.wait(120)
finally:
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
text = (scratch / "log").read_text()
steps = [int(step) for step in re.findall(r" step (\d+)/", text)]
print(f"{seconds:.0f} s: {max(steps, default=0)} steps, {text.count('saved ')} saves, {text.count('validation at')} evaluations")
if status != 75 or len(samples) < 2 * PARTS or "warning" in text:
    sys.exit(f"{text[-3000:]}\nFAILED: exit status {status} instead of 75, too few samples, or a warning")

failed = []
for name in samples[0][1]:
    # Evaluations come and go: compare the middle of the values for memory, and the largest for what is counted.
    value = statistics.median if "memory" in name else max
    parts = [value([one[name] for at, one in samples if part <= at * PARTS / seconds < part + 1] or [0])
             for part in range(PARTS)]
    early, late = value(parts[1:3]), value(parts[3:])
    grows = late > early + (0.03 * early + 16 if "memory" in name else 64 if "shm" in name else 2)
    failed += [name] * grows
    print(f"{name:<18}", *(f"{part:>9,.0f}" for part in parts), "  GROWS" if grows else "")
sys.exit(f"FAILED: {', '.join(failed)} grew" if failed else 0)
END
echo "nothing grew"
