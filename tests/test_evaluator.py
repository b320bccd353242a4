"""Evaluation while main.py trains: it changes nothing, and the best checkpoint is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pickle
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.commands import read_metrics
from helpers.evaluation import ALONE
from helpers.tiny import TinyBackbone
from helpers.training import MODES, RESUME, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.pairs import PairImages, PairList
from utils import preflight
from utils.checkpoint import layout
from utils.errors import UserError
from utils.evaluation.embed import embed_images
from utils.evaluation.pairs import PairEvalSet
from utils.evaluation.protocol import Result
from utils.options import parse_options
from utils.signals import EXIT_SAVED
from utils.training.evaluator import Evaluation, Evaluator
from utils.training.metrics import TrainingLog

SCORE = PairEvalSet.score


def train_and_keep_embeddings(rank: int, world_size: int, argv: list[str]) -> list[np.ndarray]:
    """`train`; returns the embeddings of each evaluation (rank 0)."""
    kept = []

    def score(eval_set: PairEvalSet, embeddings: np.ndarray) -> Result:
        kept.append(embeddings)
        return SCORE(eval_set, embeddings)

    with mock.patch.object(PairEvalSet, "score", score):
        train(rank, world_size, argv)
    return kept


def train_with_accuracies(
    rank: int, world_size: int, argv: list[str], accuracies: list[float], seconds: float = 0
) -> float:
    """`train`, with evaluations that return `accuracies` in turn (rank 0) and take `seconds` each.

    Returns the seconds that were excluded from the images per second.
    """
    answers, paused = iter(accuracies), []

    def score(eval_set: PairEvalSet, embeddings: np.ndarray) -> Result:
        time.sleep(seconds)
        result, accuracy = SCORE(eval_set, embeddings), next(answers)
        return dataclasses.replace(result, headline=accuracy, metrics={**result.metrics, "accuracy": accuracy})

    with (
        mock.patch.object(PairEvalSet, "score", score),
        mock.patch.object(TrainingLog, "pause", lambda self, seconds: paused.append(seconds)),
    ):
        train(rank, world_size, argv)
    assert rank != 0 or next(answers, None) is None, "fewer evaluations than expected"
    return sum(paused)


def saved_tensors(path: Path) -> dict[str, torch.Tensor]:
    contents = torch.load(path, weights_only=True)
    momentum = {f"{key} of {name}": tensor
                for name, state in contents["optimizer"].items() for key, tensor in state.items()}
    return {**contents["state_dict"], **momentum}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "mode"), [(1, "base"), (2, "base"), (3, "sharded, ZeRO")])
def test_evaluation_changes_nothing(pools, faces, tmp_path, world_size, mode):
    """Losses and weights are the same to the bit, and it evaluates what the checkpoint of that step holds."""
    flags = [str(faces), *RESUME, *MODES[mode], "--seed", "5"]
    sets = ["--val-pairs", str(faces / "lfw" / "pair.list"), "--val-freq", "3"]
    alone, evaluated = tmp_path / "alone", tmp_path / "evaluated"
    pools(world_size).run(train, [*flags, "--output", str(alone)])
    kept = pools(world_size).run(train_and_keep_embeddings, [*flags, *sets, "--output", str(evaluated)])
    lines = read_metrics(evaluated)
    assert [line["step"] for line in lines if "val" in line] == [3, 6, 8]  # every three steps, and at the end
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]
    assert [line["epoch"] for line in lines] == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    keys = ("step", "epoch", "loss", "lr")
    assert [[line[key] for key in keys] for line in lines if "val" not in line] == [
        [line[key] for key in keys] for line in read_metrics(alone)]
    saved = [saved_tensors(output / "checkpoint.pth.tar") for output in (alone, evaluated)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])

    pairs, backbone = PairList(faces / "lfw/imgs", faces / "lfw/pair.list"), TinyBackbone(batch_norm=True)
    backbone.load_state_dict(torch.load(evaluated / "checkpoint.pth.tar", weights_only=True)["state_dict"])
    embeddings = embed_images(backbone, PairImages(pairs), ALONE, batch_size=60, workers=0, progress=False)
    assert [len(of_rank) for of_rank in kept] == [3, *[0] * (world_size - 1)]
    np.testing.assert_allclose(kept[0][-1], embeddings, atol=2e-6)
    assert np.abs(kept[0][1] - embeddings).max() > 1e-4
    result = SCORE(PairEvalSet("lfw", pairs), kept[0][-1])
    assert lines[-1]["val"]["lfw"] == result.metrics


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_with_its_shards(pools, faces, tmp_path):
    flags = [str(faces), *RESUME, "--enable-model-parallel", "--val-pairs", str(faces / "lfw" / "pair.list"),
             "--output", str(tmp_path)]
    checkpoint, best = tmp_path / "checkpoint.pth.tar", tmp_path / "model_best.pth.tar"

    def state(path: Path) -> tuple[int, float]:
        step = torch.load(path, weights_only=True)["position"]["step"]
        return step, layout.read_best_score(str(path.resolve().parent))

    pools(2).run(train_with_accuracies, [*flags, "--seed", "5", "--val-freq", "1", "--max-steps", "3"], [0.6, 0.8, 0.7])
    assert state(checkpoint) == (3, 0.8) and state(best) == (2, 0.8)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000002", "step-00000003"}
    # It is complete: another run can continue from it, with its output elsewhere.
    other = tmp_path / "other"
    pools(2).run(train, [str(faces), *RESUME, "--enable-model-parallel", "--resume", str(best), "--output", str(other),
                         "--no-save"])
    assert [line["step"] for line in read_metrics(other)] == [3, 4, 5, 6, 7, 8]
    step_3 = read_metrics(tmp_path)[4]
    assert step_3["step"] == 3 and read_metrics(other)[0]["loss"] == step_3["loss"]

    # A resumed run remembers the best score, unless it evaluates other sets.
    pools(2).run(train_with_accuracies, [*flags, "--resume", str(checkpoint)], [0.75, 0.79])
    assert state(checkpoint) == (8, 0.8) and state(best) == (2, 0.8)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"step-0000000{step}" for step in (2, 4, 8)}
    assert [(line["step"], line["val"]["lfw"]["accuracy"]) for line in read_metrics(tmp_path) if "val" in line] == [
        (1, 0.6), (2, 0.8), (3, 0.7), (4, 0.75), (8, 0.79)]
    pools(2).run(train_with_accuracies, [*flags, "--resume", str(best), "--epochs", "1"], [0.81])
    assert state(checkpoint) == state(best) == (4, 0.81)
    assert [line["step"] for line in read_metrics(tmp_path) if "val" in line] == [1, 2, 4]
    copy = shutil.copytree(faces / "lfw", tmp_path / "lfw")
    pools(2).run(train_with_accuracies, [*flags, "--val-pairs", str(copy / "pair.list"), "--resume", str(best)], [0.5])
    assert state(best) == (8, 0.5)


def train_with_trouble(rank: int, world_size: int, argv: list[str], trouble: str) -> tuple[int, str]:
    """`train`; during the first evaluation an image is lost on the last rank, or rank 0 receives SIGTERM."""
    out, images = io.StringIO(), []

    def encoded(self: PairImages, i: int) -> tuple[bytes, str]:
        images.append(i)
        if trouble == "lost image" and rank == world_size - 1 and len(images) == 1:
            raise UserError("imgs/x.jpg: No such file")
        if trouble == "SIGTERM" and rank == 0 and len(images) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.pairs.encoded(i)

    sets = preflight.open_validation_sets(parse_options(argv))
    with (mock.patch.object(preflight, "open_validation_sets", lambda options: sets),
          mock.patch.object(PairImages, "encoded", encoded), contextlib.redirect_stdout(out)):
        return train(rank, world_size, argv), out.getvalue()


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_that_fails_costs_nothing(pools, faces, tmp_path, world_size):
    flags = [str(faces), *RESUME, "--val-pairs", str(faces / "lfw" / "pair.list"), "--output", str(tmp_path)]
    (status, output), *_ = pools(world_size).run(train_with_trouble, flags, "lost image")
    assert status == 0 and "step 4 failed (imgs/x.jpg: No such file)" in output, output
    assert output.rstrip().splitlines()[-1].startswith("done: 8 steps") and "1 evaluations failed" in output
    assert [line["step"] for line in read_metrics(tmp_path) if "val" in line] == [8]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert (tmp_path / "model_best.pth.tar").resolve() == (tmp_path / "checkpoint.pth.tar").resolve()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_drops_the_evaluation_and_the_resumed_run_makes_it(pools, faces, tmp_path, world_size):
    flags = [str(faces), *RESUME, "--seed", "5", "--val-pairs", str(faces / "lfw" / "pair.list"), "--max-steps", "4",
             "--output", str(tmp_path)]
    answers = pools(world_size).run(train_with_trouble, flags, "SIGTERM")
    assert [status for status, _ in answers] == [EXIT_SAVED] * world_size, answers
    assert "stopped by SIGTERM after step 4" in answers[0][1]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    assert not (tmp_path / "model_best.pth.tar").exists()
    pools(world_size).run(train_with_accuracies, [*flags, "--resume", "auto"], [0.7])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 4]
    assert layout.read_best_score(str((tmp_path / "model_best.pth.tar").resolve().parent)) == 0.7
    pools(world_size).run(train_with_accuracies, [*flags, "--resume", "auto"], [])  # once
    pools(world_size).run(train_with_accuracies, [*flags, "--resume", "auto", "--max-steps", "5"], [0.6])
    assert os.readlink(tmp_path / "model_best.pth.tar").startswith("checkpoints/step-00000004")


@pytest.mark.slow
def test_evaluation_without_checkpoints(pools, faces, tmp_path):
    """Two sets, one of them a .bin: their mean counts, and nothing is saved."""
    images = [open(path, "rb").read() for path in sorted((faces / "lfw/imgs").rglob("*.jpg"))[:8]]
    (tmp_path / "small.bin").write_bytes(pickle.dumps((images, [True, False] * 2)))
    paused, = pools(1).run(train_with_accuracies, [
        str(faces), *RESUME, "--val-pairs", str(faces / "lfw" / "pair.list"), "--val-bin", str(tmp_path / "small.bin"),
        "--no-save", "--output", str(tmp_path / "run"),
    ], [0.9, 0.5, 0.6, 0.6], 0.1)
    assert paused >= 4 * 0.1  # its time is excluded from the images per second
    evaluations = [line["val"] for line in read_metrics(tmp_path / "run") if "val" in line]
    assert [{name: result["accuracy"] for name, result in sets.items()} for sets in evaluations] == [
        {"lfw": 0.9, "small": 0.5}, {"lfw": 0.6, "small": 0.6}]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 6)) for event in events.Scalars("val/lfw/accuracy")] == [(4, 0.9), (8, 0.6)]
    assert not list((tmp_path / "run").glob("*.tar")) and not (tmp_path / "run" / "checkpoints").exists()


def test_sets_are_checked_before_training(faces, tmp_path):
    images = [open(path, "rb").read() for path in sorted((faces / "lfw/imgs").rglob("*.jpg"))[:8]]
    images[5] = images[5][:700]
    (tmp_path / "bad.bin").write_bytes(pickle.dumps((images, [True, False] * 2)))
    with pytest.raises(UserError, match="bad.bin, image 5"):
        preflight.open_validation_sets(parse_options([str(faces), "--val-bin", str(tmp_path / "bad.bin")]))
    with pytest.raises(UserError, match="--val-pairs .*none.list: "):
        flags = [str(faces), "--val-pairs", "none.list", "--imgs-root", str(faces)]
        preflight.open_validation_sets(parse_options(flags))


def test_when_an_evaluation_is_due() -> None:
    settings = dict(batch_size=8, workers=0)
    evaluator = Evaluator(ALONE, [mock.Mock()], freq=3, **settings)
    assert [step for step in range(1, 8) if evaluator.is_due(step)] == [3, 6]
    assert not any(Evaluator(ALONE, [], freq=3, **settings).is_due(step) for step in range(1, 8))
    assert not any(Evaluator(ALONE, [mock.Mock()], freq=None, **settings).is_due(step) for step in range(1, 8))


def test_an_evaluation_in_words() -> None:
    evaluation = Evaluation(0.75, {"lfw": mock.Mock(summary="75.00% +- 1.00")}, 2.0)
    assert evaluation.describe(None) == "lfw 75.00% +- 1.00  mean 75.00% (the best so far)  in 2.0 s"
    assert "(best 80.00%)" in evaluation.describe(0.8) and "(the best so far)" in evaluation.describe(0.7)
