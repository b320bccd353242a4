"""Sub-center ArcFace (--sub-centers) against plain float64 PyTorch, with every kind of loss; its checkpoints and files.

Deng et al., "Sub-center ArcFace", ECCV 2020: a class has several centers, and its cosine is that of the closest.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.exported import NAMES, SHARDED, export_to, save, start
from helpers.margins import TRUTH, true_arcface, true_gradients
from helpers.parity import assert_equal, run_training, true_training
from helpers.planning import RUN, kept_for_backward, predict
from helpers.saved import assert_same_training, saved_training
from helpers.training import RESUME, train

import main
from data.folder import FaceFolder
from losses.class_major import margin_softmax_class_major
from losses.fused import chunk_classes, margin_softmax
from losses.margins import MARGINS, ArcFace
from losses.softmax import margin_softmax_plain, margin_softmax_torchshard
from models.classifier import initial_centers
from utils import preflight
from utils.checkpoint.init_from import check_init_from
from utils.checkpoint.reader import read_resumable
from utils.checkpoint.weights import open_weights
from utils.dist.sharding import ClassShard, init_model_parallel
from utils.errors import UserError
from utils.launch.plan import plan_processes
from utils.options import parse_options

LOSSES = ["arcface", "curricularface", "magface"]  # a target, mapped negatives, a norm with a gradient
FORMS = {
    "one chunk": (margin_softmax, dict(saved_probs_mib=1e9)),
    "chunks of two classes": (margin_softmax, dict(chunk=7)),  # 7, 6 or 6 centers
    "chunks of a class, half of them saved": (margin_softmax, dict(chunk=1, saved_probs_mib=30 * 19 * 8 * 9 / 2**20)),
    "filter": (margin_softmax, dict(chunk=9, filter_above=0.2)),
    "class-major": (margin_softmax_class_major, dict(chunk=7, saved_probs_mib=30 * 19 * 8 / 2**20)),
    "class-major, filter": (margin_softmax_class_major, dict(chunk=7, filter_above=0.2)),
    "torchshard": (margin_softmax_torchshard, {}),
}
WALKS = pytest.mark.parametrize("form", [margin_softmax, margin_softmax_class_major])
# 2 classes leave a shard empty at three ranks, 11 do not divide, 12 do.
CASES = [*itertools.product((2, 11, 12), (2, 3), FORMS), (11, 1, "one chunk"), (11, 1, "torchshard")]


def inputs(num_classes: int, sub_centers: int, name: str) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """Embeddings at all angles to a center of their class, centers, norms where the margin wants them, and labels."""
    generator = torch.Generator().manual_seed(num_classes)
    embedding, centers = (torch.randn(rows, 16, generator=generator, dtype=torch.float64)
                          for rows in (30, num_classes * sub_centers))
    label = torch.randint(num_classes, (30,), generator=generator)
    toward = label * sub_centers + torch.randint(sub_centers, (30,), generator=generator)
    embedding += torch.linspace(-3, 3, 30)[:, None] * F.normalize(centers[toward])
    return [F.normalize(embedding), centers, 10 * embedding.norm(dim=1) if MARGINS[name].uses_norm else None], label


def run_forms(rank: int, world_size: int, name: str) -> list[tuple[np.ndarray, ...]]:
    """For each case: loss, num_closer, gradient of this rank's centers, of embeddings and norms (summed)."""
    results = []
    for num_classes, sub_centers, form in CASES:
        (embedding, centers, norm), label = inputs(num_classes, sub_centers, name)
        shard, (loss_function, more) = ClassShard(num_classes, rank, world_size), FORMS[form]
        centers = centers[shard.start * sub_centers:shard.stop * sub_centers].clone().requires_grad_()
        leaves = [tensor.requires_grad_() for tensor in (embedding, norm) if tensor is not None]
        target = torch.where((label >= shard.start) & (label < shard.stop), label - shard.start, -1)
        loss, closer = loss_function(embedding, target, centers, MARGINS[name]().double(), scale=16.0, norm=norm,
                                     group=init_model_parallel(world_size), sub_centers=sub_centers, **more)
        loss.backward()
        for leaf in leaves:
            dist.all_reduce(leaf.grad)
        results.append((loss.detach().numpy(), closer.numpy(), *(leaf.grad.numpy() for leaf in (centers, *leaves))))
    return results


def assert_near(mine: np.ndarray, true: torch.Tensor) -> None:
    assert np.linalg.norm(mine - true.numpy()) <= 1e-10 * true.norm()


def filtered(negatives, cosine, target, phi):
    mapped = cosine if negatives is None else negatives(cosine, target, phi)
    return mapped.masked_fill(cosine > 0.2, -1e9)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients(pools, name, world_size):
    results = pools(world_size).run(run_forms, name)
    for number, (num_classes, sub_centers, form) in enumerate(CASES):
        tensors, label = inputs(num_classes, sub_centers, name)
        phi, negatives, penalty = TRUTH[name].parts()
        if "filter" in form:
            negatives = lambda *values, own=negatives: filtered(own, *values)  # noqa: E731
        loss, (embedding_grad, centers_grad, *norm_grad), closer = true_gradients(
            tensors, label, 16.0, phi, negatives, penalty, sub_centers)
        for got_loss, got_closer, _, *grads in (result[number] for result in results):
            assert_near(got_loss, loss)
            np.testing.assert_array_equal(got_closer, closer.numpy())
            for mine, true in zip(grads, [embedding_grad, *norm_grad], strict=True):
                assert_near(mine, true)
        assert_near(np.concatenate([result[number][2] for result in results]), centers_grad)


@pytest.mark.parametrize("form", [margin_softmax, margin_softmax_class_major, margin_softmax_plain])
def test_a_center_that_is_not_the_closest_gets_no_gradient(form):
    """Neither of the target's class nor of another. Of equally close ones the first counts, and once."""
    centers = torch.zeros(4, 3, 16)  # classes, their centers, d
    centers[..., 0] = torch.tensor([[0.1, 0.8, 0.3], [0.5, 0.9, 0.9], [-0.2, -0.1, -0.3], [0.6, 0.6, 0.6]])
    centers[..., 1] = (1 - centers[..., 0] ** 2).sqrt()
    centers = centers.view(12, 16).requires_grad_()
    embedding = torch.eye(16)[:1].clone().requires_grad_()
    loss, closer = form(embedding, torch.tensor([0]), centers, MARGINS["arcface"](), scale=4.0, group=None,
                        sub_centers=3)
    loss.backward()
    touched = [[False, True, False], [False, True, False], [False, True, False], [True, False, False]]
    assert (centers.grad.view(4, 3, 16) != 0).any(2).tolist() == touched
    assert closer.tolist() == [1]  # a class, of which two centers are closer than the target


@WALKS
@pytest.mark.parametrize("saved_probs_mib", [0.0, 1e9])
def test_no_center_of_the_target_is_a_negative(form, saved_probs_mib):
    """Where low precision rounds two cosines alike, the walk and the target may differ in which one is the closest."""
    angle = torch.tensor([0.5, 0.4999, 1.5, 1.4])  # of the target's two centers, and of another class's
    centers = torch.stack([angle.cos(), angle.sin()], dim=1).requires_grad_()
    embedding = torch.eye(2)[:1].clone().requires_grad_()
    results = []
    for matmul_dtype in (None, torch.bfloat16):
        centers.grad = None
        loss, closer = form(embedding, torch.tensor([0]), centers, MARGINS["arcface"](), scale=8.0,
                                      group=None, matmul_dtype=matmul_dtype, saved_probs_mib=saved_probs_mib,
                                      sub_centers=2)
        loss.backward()
        assert closer.item() == 0 and centers.grad[0].tolist() == [0, 0] and centers.grad[1].abs().sum() > 0
        results.append(loss.item())
    assert results[1] == pytest.approx(results[0], rel=0.05)


class Squares(ArcFace):
    """A map under which the logit of a center that was left out is a large one."""

    def negatives(self, cosine, target, phi):
        return cosine**2, 2 * cosine


@WALKS
@pytest.mark.parametrize("saved_probs_mib", [0.0, 1e9])
def test_any_map_of_the_negatives(form, saved_probs_mib):
    tensors, label = inputs(11, 2, "arcface")
    loss, grads, _ = true_gradients(tensors, label, 16.0, true_arcface, lambda cosine, target, phi: cosine**2,
                                    sub_centers=2)
    leaves = [tensor.requires_grad_() for tensor in tensors[:2]]
    got, _ = form(leaves[0], label, leaves[1], Squares(), scale=16.0, group=None, sub_centers=2, chunk=6,
                            saved_probs_mib=saved_probs_mib)
    assert_near(got.detach().numpy(), loss)
    for mine, true in zip(torch.autograd.grad(got, leaves), grads):
        assert_near(mine.numpy(), true)


@WALKS
def test_a_nan_is_the_closest(form):
    centers = torch.randn(4, 16)
    centers[1] = float("nan")
    loss, closer = form(F.normalize(torch.randn(3, 16)), torch.full((3,), 1), centers, MARGINS["arcface"](),
                                  scale=4.0, group=None, sub_centers=2)
    assert loss.isnan() and (closer > 0).all()


@WALKS
@pytest.mark.parametrize("saved_probs_mib", [0.0, 1e9])
@pytest.mark.parametrize(("matmul_dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_low_precision_operands_are_near(form, matmul_dtype, tolerance, saved_probs_mib):
    tensors, label = inputs(11, 3, "curricularface")
    leaves = [tensor.float().requires_grad_() for tensor in tensors[:2]]
    results = []
    for kind in (None, matmul_dtype):
        loss, _ = form(leaves[0], label, leaves[1], MARGINS["curricularface"](), scale=8.0, group=None,
                                 matmul_dtype=kind, saved_probs_mib=saved_probs_mib, chunk=12, sub_centers=3)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for true, mine in zip(*results):
        assert 0 < (mine - true).norm() <= tolerance * true.norm()


TRAINING = {
    "base, ZeRO": (2, 5, ["--enable-zero-optim"]),
    "sharded": (1, 5, SHARDED),
    "sharded, accumulation": (2, 4, [*SHARDED, "--accumulation-steps", "2"]),
    "sharded, empty shard": (3, 2, SHARDED),
    "sharded, torchshard": (2, 5, [*SHARDED, "--classifier", "torchshard"]),
    "sharded, fused update, ZeRO": (3, 5, [*SHARDED, "--fuse-classifier-update", "--enable-zero-optim"]),
}


@pytest.mark.parametrize(("mode", "name", "sub_centers"), [
    *((mode, "arcface", 3) for mode in TRAINING),
    ("sharded, accumulation", "curricularface", 2), ("sharded, empty shard", "magface", 3),
    ("sharded, fused update, ZeRO", "magface", 2), ("base, ZeRO", "curricularface", 3),
])
def test_training_equals_a_single_process(pools, name, sub_centers, mode):
    world_size, num_classes, flags = TRAINING[mode]
    outcomes = pools(world_size).run(run_training, num_classes, False, [
        *flags, "--precision", "float64", "--sub-centers", str(sub_centers)], name)
    truth = true_training(num_classes, False, TRUTH[name], sub_centers=sub_centers)
    assert_equal(outcomes, truth, "--enable-model-parallel" in flags, 1e-9, num_classes, sub_centers)


def test_resume_on_other_numbers_of_processes(pools, faces, tmp_path):
    flags = [str(faces), *RESUME, "--sub-centers", "2", "--precision", "float64", "--sync-bn", "--seed", "3"]
    pools(1).run(train, [*flags, "--max-steps", "4", "--output", str(tmp_path / "whole")])
    resharded = [*flags, *SHARDED, "--resume", "auto", "--output", str(tmp_path / "parts")]
    for world_size, steps in ((2, 2), (1, 3), (3, 4)):
        pools(world_size).run(train, [*resharded, "--max-steps", str(steps)])
    assert_same_training(tmp_path / "parts", tmp_path / "whole", tolerance=1e-9)
    assert len(saved_training(tmp_path / "parts")["centers"]) == 22
    options = parse_options([*resharded, "--sub-centers", "3"])
    words = "trained with --sub-centers 2, this run has --sub-centers 3; give --sub-centers 2, or start a run.*--init"
    with pytest.raises(UserError, match=words):
        read_resumable(main.resume_request(options))


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture(scope="module")
def checkpoints(pools, tmp_path_factory) -> dict[int, Path]:
    """By the number of centers of each of the 11 classes; each center is its initial one of seed 1."""
    outputs = {sub_centers: tmp_path_factory.mktemp(f"{sub_centers}") for sub_centers in (1, 2)}
    for sub_centers, output in outputs.items():
        pools(2).run(save, str(output), 11, NAMES, [*SHARDED, "--sub-centers", str(sub_centers)])
    return {sub_centers: output / "checkpoint.pth.tar" for sub_centers, output in outputs.items()}


def centers_of(num_classes: int, sub_centers: int, seed: int) -> np.ndarray:
    """(classes, sub_centers, d)"""
    rows = initial_centers(ClassShard(num_classes * sub_centers, 0, 1), 512, seed).numpy()
    return rows.reshape(num_classes, sub_centers, 512)


# The run's identities, and for each of its classes the class in the file (-1: the initial centers of seed 2).
OTHERS = ["person 10", "person 3", "new", "person 0"], [10, 3, -1, 0, -1]


@pytest.mark.parametrize(("stored", "own", "words"), [
    (2, 2, "by identity (2 of each class): 3 kept"), (1, 2, "by identity (1 of each class; its other centers are ini"),
    (2, 3, "by identity (2 of each class; its other centers are initialized): 3 kept"),
])
def test_the_centers_of_a_class_move_together(pools, checkpoints, stored, own, words):
    names, classes = OTHERS
    expected = centers_of(5, own, 2)
    for label, row in enumerate(classes):
        if row >= 0:
            expected[label, :stored] = centers_of(11, stored, 1)[row]
    flags = [*SHARDED, "--sub-centers", str(own)]
    outcomes = pools(2).run(start, str(checkpoints[stored]), 5, names, flags)
    np.testing.assert_array_equal(np.concatenate([mine for _, mine, _ in outcomes]), expected.reshape(-1, 512))
    assert words in outcomes[0][0]


def test_fewer_centers_are_refused(checkpoints):
    with pytest.raises(UserError, match="2 centers of each class, and this run has 1; give --sub-centers 2, or .*exp"):
        check_init_from(str(checkpoints[2]), "mobilefacenet", 512)


@pytest.mark.parametrize(("format", "name", "flags"), [("torchshard", "a.pth.tar", []),
                                                       ("safetensors", "a.safetensors", ["--centers"])])
def test_exported_files_say_how_many_centers_a_class_has(checkpoints, tmp_path, format, name, flags):
    if format == "safetensors":
        pytest.importorskip("safetensors")
    for sub_centers, path in checkpoints.items():
        weights = open_weights(str(export_to(path, format, tmp_path / f"{sub_centers}{name}", *flags)),
                               with_centers=True)
        assert (weights.sub_centers, weights.identities) == (sub_centers, NAMES)
        rows = torch.cat([rows for _, rows in weights.centers.blocks()])
        np.testing.assert_array_equal(rows.numpy(), centers_of(11, sub_centers, 1).reshape(-1, 512))


@pytest.mark.parametrize(("entry", "words"), [
    (0, "number of sub-centers is damaged"), ("2", "number of sub-centers is damaged"), (4, "22 rows, which are not 4"),
])
def test_damaged_numbers_of_centers(checkpoints, tmp_path, entry, words):
    exported = export_to(checkpoints[2], "torchshard", tmp_path / "a.pth.tar")
    torch.save({**torch.load(exported, weights_only=True), "sub_centers": entry}, tmp_path / "b.pth.tar")
    with pytest.raises(UserError, match=f"b.pth.tar: .*{re.escape(words)}"):
        open_weights(str(tmp_path / "b.pth.tar"), with_centers=True)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("memory_mib", [0.1, 1000])
def test_predicted_memory(memory_mib):
    parts, more = predict(sub_centers=3), predict(classes=3 * RUN.classes)
    for name in parts:
        assert name == "chunk buffers" or parts[name] == more[name], name
    rows, classes = 8, 1400
    embedding = F.normalize(torch.randn(rows, 512)).requires_grad_()
    centers, label = torch.randn(classes * 3, 512, requires_grad=True), torch.arange(rows)
    kept = kept_for_backward(
        lambda: margin_softmax(embedding, label, centers, MARGINS["arcface"](), scale=64.0, group=None,
                               saved_probs_mib=memory_mib, sub_centers=3), [embedding, centers])
    run = dict(classes=classes, batch_size=rows, world_size=1, classifier_memory_mib=memory_mib, sub_centers=3)
    assert sum(tensor.nbytes for tensor in kept if tensor.ndim == 3) == predict(**run)["saved probabilities"] > 0


def test_the_table_of_a_run_says_it(faces):
    options = parse_options([str(faces), "-a", "mobilefacenet", "--num-classes", "9", "--sub-centers", "3", "-b", "4"])
    plan = plan_processes(options)
    table = preflight.run_table(options, plan, FaceFolder(str(faces)), [])
    assert "9 classes" in table and "3 centers each, 13,824 parameters" in table and "up to 27 per process" in table
    with pytest.raises(UserError, match="fewer --sub-centers"):
        preflight.check_memory(dataclasses.replace(options, sub_centers=10**9), plan)


def test_chunks_are_whole_classes_and_whole_cache_lines():
    for sub_centers in (1, 2, 3, 5, 16, 300):
        chunk = chunk_classes(128, 512, 8 * 2**20, sub_centers=sub_centers)
        assert chunk % sub_centers == 0 and (chunk % 16 == 0 or sub_centers == 300) and 1200 <= chunk <= 1638
