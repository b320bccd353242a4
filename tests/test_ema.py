"""--ema: the average of the backbone's weights, against a plain one, in checkpoints, and where it is used."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers.commands import read_metrics
from helpers.evaluation import ALONE
from helpers.saved import assert_same_training, saved_training
from helpers.tiny import TinyBackbone
from helpers.training import MODES, RESUME, train

from data.pairs import PairImages, PairList
from utils.checkpoint import weights
from utils.evaluation.embed import embed_images
from utils.evaluation.pairs import PairEvalSet
from utils.training.ema import WeightAverage
from utils.training.metrics import TrainingLog


def true_average(values: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """Of a state dict before the first step and after each one."""
    average = {name: value.clone() for name, value in values[0].items()}
    for n, value in enumerate(values[1:]):
        d = min(decay, (1 + n) / (10 + n))
        average = {name: d * average[name] + (1 - d) * value[name] for name in average}
    return average


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_the_average_of_weights_and_statistics(decay):
    torch.manual_seed(0)
    module = TinyBackbone(batch_norm=True).double()
    ema, values = WeightAverage(module, decay), [{name: v.clone() for name, v in module.state_dict().items()}]
    for step in range(12):
        module(torch.randn(4, 3, 112, 112, dtype=torch.float64))  # changes the running statistics
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += torch.randn_like(parameter)
        if step % 3 == 1:
            before = {name: value.clone() for name, value in ema.state()["state_dict"].items()}
            ema.update(torch.ones(()))  # a skipped step: neither counted nor averaged
            assert all(torch.equal(before[name], value) for name, value in ema.state()["state_dict"].items()
                       if value.is_floating_point())
            continue
        ema.update(torch.zeros(()) if step % 2 else None)
        values.append({name: value.clone() for name, value in module.state_dict().items()})
    assert float(ema.state()["updates"]) == 8
    true, found = true_average(values, decay), ema.state()["state_dict"]
    for name, value in true.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    assert found["bn.num_batches_tracked"] == 12 and found.keys() == module.state_dict().keys()

    last = {name: value.clone() for name, value in module.state_dict().items()}
    with ema.in_place():
        torch.testing.assert_close(module.fc.weight.detach(), true["fc.weight"])
    assert all(torch.equal(last[name], value) for name, value in module.state_dict().items())


RUN = [*RESUME, "--ema", "0.5"]


def averages_of(output: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in saved_training(output).items() if name.startswith("ema ")}


def saved_values(output: Path) -> list[dict[str, torch.Tensor]]:
    """The weights of a run with --seed 5 and --save-freq 1, before the first step and after each one."""
    torch.manual_seed(5)
    return [TinyBackbone(batch_norm=True).state_dict(), *(
        torch.load(path, weights_only=True)["state_dict"]
        for path in sorted(output.glob("checkpoints/*/state.pth.tar")))]


@pytest.mark.slow
def test_the_average_of_a_run(pools, faces, tmp_path):
    """From the weights that the run saved after each step; at two numbers of processes; resumed to the bit."""
    averages = []
    for world_size, mode in (1, "base"), (3, "sharded, ZeRO"):
        output, parts = tmp_path / str(world_size), tmp_path / f"parts-{world_size}"
        flags = [str(faces), *RUN, *MODES[mode], "--seed", "5", "--precision", "float64", "--sync-bn"]
        pools(world_size).run(
            train, [*flags, "--max-steps", "3", "--save-freq", "1", "--keep", "9", "--output", str(output)])
        averages.append(averages_of(output))
        for name, true in true_average(saved_values(output), 0.5).items():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(averages[-1][f"ema {name}"], true, rtol=1e-6, atol=1e-7)
        pools(world_size).run(train, [*flags, "--max-steps", "2", "--output", str(parts)])
        pools(world_size).run(train, [*flags, "--max-steps", "3", "--output", str(parts), "--resume", "auto"])
        assert_same_training(parts, output)
    for name, value in averages[0].items():
        torch.testing.assert_close(averages[1][name], value, rtol=1e-9, atol=1e-9)
    # One process resumes a checkpoint of three.
    pools(3).run(train, [*flags, "--max-steps", "2", "--output", str(tmp_path / "other")])
    pools(1).run(train, [str(faces), *RUN, "--precision", "float64", "--max-steps", "3", "--resume", "auto",
                         "--output", str(tmp_path / "other")])
    for name, value in averages[0].items():
        torch.testing.assert_close(averages_of(tmp_path / "other")[name], value, rtol=1e-9, atol=1e-9)


def train_and_listen(rank: int, world_size: int, argv: list[str]) -> str:
    """`train`; what it reports."""
    texts: list[str] = []
    with mock.patch.object(TrainingLog, "say", lambda log, text: texts.append(text)), mock.patch.object(
            weights, "build_backbone", lambda arch, embedding_size: TinyBackbone(batch_norm=True)):
        train(rank, world_size, argv)
    return "\n".join(texts)


def test_an_average_that_is_added_or_dropped(pools, faces, tmp_path):
    flags = [str(faces), *RESUME, "--seed", "5", "--output", str(tmp_path), "--resume", "auto"]
    pools(1).run(train, [*flags, "--max-steps", "1"])
    before = saved_training(tmp_path)
    assert averages_of(tmp_path) == {}
    (text,) = pools(1).run(train_and_listen, [*flags, "--max-steps", "2", "--ema", "0.5"])
    assert "--ema 0.5 (was off)" in text and "--ema starts from these weights" in text
    after = saved_training(tmp_path)
    torch.testing.assert_close(after["ema fc.weight"],
                               0.1 * before["weight fc.weight"] + 0.9 * after["weight fc.weight"])
    assert int(after["ema updates"]) == 1
    (text,) = pools(1).run(train_and_listen, [*flags, "--max-steps", "3"])
    assert "--ema off (was 0.5)" in text and averages_of(tmp_path) == {}


def test_the_average_is_evaluated_and_read(pools, faces, tmp_path):
    """Evaluations and all readers of weights use the average; training keeps its own weights."""
    flags = [str(faces), *RUN, "--seed", "5", "--max-steps", "3"]
    sets = ["--val-pairs", str(faces / "lfw" / "pair.list"), "--val-freq", "1"]
    pools(1).run(train, [*flags, *sets, "--output", str(tmp_path / "evaluated")])
    pools(1).run(train, [*flags, "--output", str(tmp_path / "alone")])
    assert_same_training(tmp_path / "evaluated", tmp_path / "alone")
    path, pairs = tmp_path / "evaluated" / "checkpoint.pth.tar", PairList(faces / "lfw/imgs", faces / "lfw/pair.list")
    with mock.patch.object(weights, "build_backbone", lambda arch, embedding_size: TinyBackbone(batch_norm=True)):
        opened = weights.open_weights(str(path))
    assert opened.averaged and opened.describe("FILE") == "iresnet50 of FILE, EMA weights"
    (text,) = pools(1).run(train_and_listen, [*flags, "--max-steps", "1", "--init-from", str(path),
                                              "--output", str(tmp_path / "from")])
    assert f"starting from {path} (EMA weights): backbone" in text
    for name, value in opened.backbone.state_dict().items():
        assert torch.equal(value, averages_of(path.parent)[f"ema {name}"])
    embeddings = embed_images(opened.backbone, PairImages(pairs), ALONE, batch_size=60, workers=0, progress=False)
    last = read_metrics(path.parent)[-1]["val"]["lfw"]
    assert PairEvalSet("lfw", pairs).score(embeddings).metrics == pytest.approx(last, abs=1e-6)
    opened.backbone.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    others = embed_images(opened.backbone, PairImages(pairs), ALONE, batch_size=60, workers=0, progress=False)
    assert PairEvalSet("lfw", pairs).score(others).metrics != pytest.approx(last, abs=1e-6)
