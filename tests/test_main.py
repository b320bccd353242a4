"""main.py and valid.py as a user runs them, on the CPU."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers.commands import ROOT, finish, free_port, read_metrics, run, start

import main
from utils.checkpoint.reader import read_resumable
from utils.errors import UserError
from utils.options import parse_options

# The published commands, run as written but for the data and what makes them short.
SHORT = ["-a", "mobilefacenet", "-b", "8", "--max-steps", "2", "--num-classes", "50"]
PUBLISHED = {
    "base": "--multiprocessing-distributed --num-classes 85744 {data}",
    "sharded": "--multiprocessing-distributed --num-classes 85744 --enable-model-parallel --model-parallel-dim 1 "
               "{data}",
    "sharded, AMP": "--multiprocessing-distributed --num-classes 85744 --enable-model-parallel --model-parallel-dim 1 "
                    "--enable-amp-mode {data}",
    "sharded, ZeRO": "--multiprocessing-distributed --num-classes 85744 --enable-model-parallel --model-parallel-dim 1 "
                     "--enable-zero-optim {data}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_single_node_commands_then_valid(faces, tmp_path, name):
    # bf16 without hardware for it is slow on a CPU
    shorter = ["-b", "4", "--max-steps", "1"] if "AMP" in name else []
    if name != "base":  # each process that loads images takes three seconds to start
        shorter += ["-j", "0"]
    sets = []
    if name == "base":
        images = [path.read_bytes() for path in sorted((faces / "lfw/imgs").rglob("*.jpg"))[:8]]
        (tmp_path / "small.bin").write_bytes(pickle.dumps((images, [True, False] * 2)))
        sets = ["--val-pairs", faces / "lfw/pair.list", "--val-bin", "small.bin", "--val-freq", 1]
    output = run("main.py", *PUBLISHED[name].format(data=faces).split(), *SHORT, *shorter, *sets, cwd=tmp_path)
    steps = 1 if "AMP" in name else 2
    lines = read_metrics(tmp_path)
    if name == "base":
        evaluation = r"^evaluation +lfw \(60 pairs\), small \(4 pairs\), every 1 steps; the best: model_best"
        assert re.search(evaluation, output, re.MULTILINE)
        validation = r"^validation at step [12]: lfw \d\S+% \+- \S+  small \d\S+% \+- \S+  mean"
        assert len(re.findall(validation, output, re.MULTILINE)) == 2
        evaluated = [(line["step"], list(line["val"])) for line in lines if "val" in line]
        assert evaluated == [(step, ["lfw", "small"]) for step in (1, 2)]
        best = (tmp_path / "model_best.pth.tar").resolve().parent
        assert json.loads((best / "evaluation.json").read_text())["score"] == max(
            sum(result["accuracy"] for result in line["val"].values()) / 2 for line in lines if "val" in line)
    for words in ("mobilefacenet", "48 of 8 identities", "seed", f"done: {steps} steps"):
        assert words in output, output
    assert [line["step"] for line in lines if "val" not in line] == list(range(1, steps + 1))
    if name == "sharded":
        output = run("valid.py", "--batch-size", 1024, "-workers", 2, "--imgs-root", faces / "lfw/imgs", "--pair-list",
                     faces / "lfw/pair.list", "--resume", "checkpoint.pth.tar", "--json", "result.json", cwd=tmp_path)
        assert re.search(r"^Accuracy: \d\.\d{5}\+-\d\.\d{5}$", output, re.MULTILINE)
        result = json.loads((tmp_path / "result.json").read_text())
        assert 0 <= result["accuracy"] <= 1
        output = run("main.py", "--evaluate", "--resume", "checkpoint.pth.tar", "--imgs-root", faces / "lfw/imgs",
                     "--pair-list", faces / "lfw/pair.list", "-b", 64, "-j", 0, cwd=tmp_path)
        assert f"Accuracy: {result['accuracy']:2.5f}" in output


def processes(count: int) -> list[object]:
    return ["--multiprocessing-distributed", "--nproc-per-node", count, "--dist-url", f"tcp://127.0.0.1:{free_port()}"]


@pytest.mark.slow
def test_two_nodes_equal_one(faces, tmp_path):
    """The published two-node command, both nodes on this machine with two processes each, against a single process."""
    common = [faces, "--enable-model-parallel", "--model-parallel-dim", 1, "-a", "mobilefacenet", "--num-classes", 11,
              "--max-steps", 2, "--precision", "float64", "--sync-bn", "--seed", 3, "-j", 0]
    address = f"tcp://127.0.0.1:{free_port()}"
    nodes = [
        start("main.py", *common, "--multiprocessing-distributed", "--dist-url", address, "--nproc-per-node", 2,
              "--batch-size", 4, "--world-size", 2, "--rank", rank, "--output", tmp_path / "two")
        for rank in (0, 1)
    ]
    outputs = [finish(node) for node in nodes]
    assert "done: 2 steps" in outputs[0] and "done" not in outputs[1]
    run("main.py", *common, "--batch-size", 8, "--output", tmp_path / "one")
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-9)
    assert (tmp_path / "two" / "checkpoint.pth.tar").exists()


@pytest.mark.slow
def test_torchrun(faces, tmp_path):
    arguments = [faces, *SHORT, "--enable-model-parallel", "--seed", 1, "--max-steps", 1, "-j", 0]
    run("main.py", *arguments, *processes(2), "--output", tmp_path / "spawn")
    run("tests/helpers/torchrun.py", "--nproc-per-node", 2, "--master-port", free_port(), "main.py", *arguments,
        "--output", tmp_path / "torchrun")
    spawn, torchrun = (read_metrics(tmp_path / name) for name in ("spawn", "torchrun"))
    assert torchrun[0]["loss"] == pytest.approx(spawn[0]["loss"], rel=1e-6)
    output = run("tests/helpers/torchrun.py", "--nproc-per-node", 2, "--master-port", free_port(), "main.py",
                 *arguments,
                 "--rank", 1, "--world-size", 2, status=1)
    assert output.count("torchrun decides the processes") == 1


@pytest.mark.slow
def test_outputs_and_a_resume_that_does_not_fit(faces, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    run("main.py", faces, *SHORT, "--output", tmp_path)
    assert len(read_metrics(tmp_path)) == 2
    assert (tmp_path / "previous-run.1" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    path = tmp_path / "checkpoint.pth.tar"
    contents = torch.load(path, weights_only=True)
    assert contents["arch"] == "mobilefacenet" and contents["num_classes"] == 50 and contents["embedding_size"] == 512
    assert contents["position"] == {"epoch": 0, "step_in_epoch": 2, "step": 2, "best_score": None,
                                    "to_evaluate": False}
    assert not any("classifier" in name for name in contents["state_dict"])  # the classifier lies in the shards alone
    assert os.readlink(path) == "checkpoints/step-00000002/state.pth.tar"
    assert contents["identities"] == sorted(path.name for path in (faces / "train").iterdir() if path.is_dir())
    for flags, words in (
        (["--num-classes", "51"], "--num-classes 50"),
        (["--arch", "iresnet18"], "--arch mobilefacenet"),
        (["--seed", str(contents["seed"] + 1)], "--seed"),
    ):
        with pytest.raises(UserError, match=words):
            read_resumable(main.resume_request(parse_options([str(faces), *SHORT, *flags, "--resume", str(path)])))


def truncate_one_image(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    image = sorted((target / "train").glob("*/*.jpg"))[3]
    data = image.read_bytes()
    image.write_bytes(data[:len(data) // 2])  # the header is whole: only decoding can tell
    return image


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded_stops_all_ranks(faces, tmp_path, workers):
    image = truncate_one_image(faces, tmp_path / "faces")
    flags = [tmp_path / "faces", *SHORT, *processes(2), "-b", 48, "--max-steps", 1, "-j", workers, "--no-save",
             "--output", tmp_path]
    output = run("main.py", *flags, status=2)
    assert output.rstrip().splitlines()[-1].startswith(f"error: {image}")
    assert output.count(str(image)) == 1 and "Traceback" not in output
    if workers == 0:
        return
    output = run("main.py", *flags[:-2], "--dist-url", f"tcp://127.0.0.1:{free_port()}", "--skip-bad-images",
                 "--output", tmp_path)
    assert "replaced 1 images" in output


def descendants(process: int) -> list[int]:
    """The processes that `process` has started, and that these have."""
    children = [int(child) for path in Path(f"/proc/{process}/task").glob("*/children")
                for child in path.read_text().split()]
    return children + [one for child in children for one in descendants(child)]


@pytest.mark.slow
def test_a_signal_to_every_process_saves_and_ends(faces, tmp_path):
    """As a batch system or Ctrl-C does it: parent, ranks and loading processes get it, the ranks twice."""
    process = start("main.py", faces, *SHORT, *processes(2), "--max-steps", 1000, "--epochs", 1000, "-p", 1, "-j", 2,
                    "--output", tmp_path, PYTHONUNBUFFERED="1")
    for line in process.stdout:
        if " step 2/" in line:
            break
    everyone = descendants(process.pid)
    assert len(everyone) >= 4  # two ranks, two loaders
    for one in (process.pid, *everyone):
        os.kill(one, signal.SIGTERM)
    output = finish(process, status=75, timeout=120)
    stopped = re.search(r"^stopped by SIGTERM after step (\d+); .*--resume auto", output, re.MULTILINE)
    assert stopped and "Traceback" not in output and "error" not in output, output
    contents = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)
    assert contents["position"]["step"] == int(stopped[1]) == len(read_metrics(tmp_path)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--plan"], ["--evaluate", "--resume", "x"]], ids=["train", "evaluate"])
def test_ctrl_c_before_training_leaves_no_traceback(faces, flags):
    process = start("main.py", faces, *flags)
    while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():  # the imports
        time.sleep(0.01)
    ignored = re.search(r"^SigIgn:\t(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    if int(ignored[1], 16) & 1 << signal.SIGINT - 1:
        process.kill()
        pytest.skip("the tests were started in the background: Ctrl-C is ignored")
    process.send_signal(signal.SIGINT)
    assert finish(process, status=-signal.SIGINT) == ""


@pytest.mark.slow
def test_torchrun_starts_again_what_was_killed(faces, tmp_path):
    """Elastic restart: a killed rank costs the steps since the checkpoint."""
    common = [faces, *SHORT, "--enable-model-parallel", "-j", 0, "-p", 1, "--epochs", 100, "--output", tmp_path]
    process = start("tests/helpers/torchrun.py", "--nproc-per-node", 2, "--master-port", free_port(),
                    "--max-restarts", 1, ROOT / "main.py",
                    *common, "--max-steps", 9, "--resume", "auto", PYTHONUNBUFFERED="1")
    for line in process.stdout:
        if " step 7/" in line:  # an epoch has six: they are saved
            break
    ranks = [one for one in descendants(process.pid) if "main.py" in Path(f"/proc/{one}/cmdline").read_text()]
    os.kill(ranks[-1], signal.SIGKILL)
    output = finish(process)
    assert "at step 6" in output and "done: 9 steps" in output, output
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 10))


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("ARCFACE_REAL_FACES"), reason="ARCFACE_REAL_FACES names no folder of real faces")
def test_real_faces(tmp_path):
    faces = Path(os.environ["ARCFACE_REAL_FACES"])
    run("main.py", faces, *processes(2), "--enable-model-parallel", "-a", "mobilefacenet", "-b", 16,
        "--num-classes", 1184,
        "--max-steps", 6, "--lr", 0.01, "--output", tmp_path, "--augment", "standard")
    assert len(read_metrics(tmp_path)) == 6
    run("valid.py", "--imgs-root", faces / "lfw/imgs", "--pair-list", faces / "lfw/pair.list", "--resume",
        tmp_path / "checkpoint.pth.tar", "--json", tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["accuracy"] > 0.5
