"""scripts/slurm.sh with Slurm's commands replaced by fakes."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
from helpers.commands import ROOT, wait_for

FAKE_SLURM = {
    "srun": """trap 'exit 75' USR1; echo "$@" > "$FAKE/command"; echo "$ARCFACE_SECRET" > "$FAKE/secret"
               echo $$ > "$FAKE/pid"; while :; do sleep 0.05; done""",
    "scancel": """[ "$*" = "--signal=USR1 $((20000 * 3 + 7)).0" ] && kill -USR1 "$(cat "$FAKE/pid")"
                  sleep 0.3""",  # srun ends before scancel does
    "scontrol": """case "$1" in show) printf 'gpu-a\\ngpu-b\\n' ;; requeue) echo "$2" > "$FAKE/requeued" ;; esac""",
}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_script_passes_the_signal_on_and_requeues(tmp_path, number):
    for name, commands in FAKE_SLURM.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{commands}\n")
        (tmp_path / name).chmod(0o755)
    process = subprocess.Popen(
        ["bash", "scripts/slurm.sh", "--epochs", "3"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "SLURM_JOB_ID": "60007",
             "SLURM_JOB_NODELIST": "gpu-[a-b]", "SLURM_JOB_NUM_NODES": "2", "DATA": "faces"},
    )
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    time.sleep(0.2)
    assert not (tmp_path / "requeued").exists()
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "back into the queue" in output
    assert (tmp_path / "requeued").read_text() == "60007\n"
    command = (tmp_path / "command").read_text()
    for words in ("main.py", "faces", "--dist-url tcp://gpu-a:20007", "--world-size 2", "--resume auto --epochs 3"):
        assert words in command
    secret = (tmp_path / "secret").read_text().strip()
    assert len(secret) == 64 and secret not in command + output
