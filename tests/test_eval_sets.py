"""Evaluation sets: opening, checking and scoring them, and what they draw."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.evaluation import ALONE, Pixels, pack, write_pairs
from PIL import Image
from torch import nn

from data.pairs import PairImages, PairList
from utils.errors import UserError
from utils.evaluation.lfw import evaluate
from utils.evaluation.pairs import PairEvalSet
from utils.evaluation.plots import draw_montage
from utils.evaluation.protocol import Result
from utils.evaluation.sets import Source, check_images, evaluate_set, open_sets


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("faces"))


def evaluate_list(backbone: nn.Module, faces: Path, lines: list[str], path: Path) -> Result:
    """The result of a pair list with these lines."""
    path.write_text("\n".join(lines))
    eval_set, = open_sets([Source("pairs", str(path), "--pair-list", str(faces / "imgs"))])
    result = evaluate_set(backbone, eval_set, ALONE, batch_size=8, workers=0)
    assert result is not None
    return result


def test_names_of_sets(faces: Path, tmp_path: Path) -> None:
    """After the file, after the directory of a pair.list, or the path where two would share a name."""
    (tmp_path / "lfw").mkdir()
    sets = open_sets([Source("pairs", str(faces / "pair.list"), "--val-pairs"),
                      Source("bin", str(pack(faces, tmp_path / "lfw.bin")), "--val-bin")])
    assert [eval_set.name for eval_set in sets] == [faces.name, "lfw"]
    assert [(eval_set.size, len(eval_set.images)) for eval_set in sets] == 2 * [("20 pairs", 24)]
    paths = [str(tmp_path / "lfw.bin"), str(pack(faces, tmp_path / "lfw" / "lfw.bin"))]
    assert [eval_set.name for eval_set in open_sets([Source("bin", path, "--bin") for path in paths])] == paths
    with pytest.raises(UserError, match="--bin .*lfw.bin: given twice"):
        open_sets([Source("bin", paths[0], "--bin"), Source("bin", paths[0], "--bin")])


def test_images_beside_the_list_must_exist(faces: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--val-pairs .*none.list: no such file"):
        open_sets([Source("pairs", str(tmp_path / "none.list"), "--val-pairs")])
    (tmp_path / "pair.list").write_text((faces / "pair.list").read_text())
    with pytest.raises(UserError, match="--val-pairs .*pair.list: .*imgs, .*--imgs-root"):
        open_sets([Source("pairs", str(tmp_path / "pair.list"), "--val-pairs")])


def test_too_few_pairs_are_refused_with_the_name_of_the_file(faces: Path, tmp_path: Path) -> None:
    lines = (faces / "pair.list").read_text().splitlines()
    (tmp_path / "one.list").write_text("\n".join(lines[:1] + lines[10:]))
    with pytest.raises(UserError, match="one.list: 1 same .* 10 different .* at least 2"):
        open_sets([Source("pairs", str(tmp_path / "one.list"), "--pair-list", str(faces / "imgs"))])
    images = [path.read_bytes() for path in sorted((faces / "imgs/0").iterdir())[:2]]
    (tmp_path / "one.bin").write_bytes(pickle.dumps((2 * images, [True, True])))
    with pytest.raises(UserError, match="one.bin: 2 same .* 0 different"):
        open_sets([Source("bin", str(tmp_path / "one.bin"), "--bin")])


def test_skipped_pairs_and_pairs_of_an_image_with_itself_are_told(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (faces / "pair.list").read_text().splitlines()
    path = lines[0].split()[0]
    (tmp_path / "pairs.txt").write_text("\n".join([*lines, f"{path} {path} 1", f"{path} gone.jpg 0"]))
    source = Source("pairs", str(tmp_path / "pairs.txt"), "--pair-list", str(faces / "imgs"), skip_missing=True)
    eval_set, = open_sets([source])
    assert eval_set.size == "21 pairs, 1 skipped for missing images"
    evaluate_set(Pixels(), eval_set, ALONE, batch_size=8, workers=0)
    assert "warning: 1 of 21 pairs are an image with itself" in capsys.readouterr().err


def test_a_damaged_image_is_found_by_the_check(faces: Path, tmp_path: Path) -> None:
    images = [path.read_bytes() for path in sorted((faces / "imgs").rglob("*.jpg"))[:8]]
    good = pickle.dumps((images, [True, False] * 2))
    images[5] = images[5][:700]
    (tmp_path / "good.bin").write_bytes(good)
    (tmp_path / "bad.bin").write_bytes(pickle.dumps((images, [True, False] * 2)))
    sets = open_sets([Source("bin", str(tmp_path / f"{name}.bin"), "--bin") for name in ("good", "bad")])
    check_images(sets[:1], progress=False)
    with pytest.raises(UserError, match="bad.bin, image 5"):
        check_images(sets, progress=False)


def test_the_result_has_what_training_and_reports_need(faces: Path, tmp_path: Path) -> None:
    lines = (faces / "pair.list").read_text().splitlines()
    result = evaluate_list(Pixels(), faces, lines, tmp_path / "pair.list")
    numbers = {"accuracy", "accuracy_std", "val", "val_std", "far", "auc", "eer", "exact_accuracy",
               "exact_accuracy_std", "threshold", "undecidable_pairs"}
    assert set(result.metrics) == {*numbers, "tar_at_far_1e-1"}
    assert set(result.json) == {*numbers, "tar_at_far", "thresholds", "tpr", "fpr"}
    assert result.headline == result.metrics["accuracy"] == result.json["accuracy"]
    assert result.summary == f"{100 * result.headline:.2f}% +- {100 * result.metrics['accuracy_std']:.2f}"
    assert [curve.label for curve in result.curves] == [tmp_path.name]


def test_a_collapsed_backbone_is_warned_of(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Constant(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(images), 4)

    lines = (faces / "pair.list").read_text().splitlines()
    assert evaluate_list(Constant(), faces, 2 * lines, tmp_path / "more.list").headline == 0.5
    assert "the validation rate means little: the false accept rate is 1.00000" in capsys.readouterr().err


def test_few_pairs_are_warned_of(faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (faces / "pair.list").read_text().splitlines()
    evaluate_list(Pixels(), faces, lines[:4] + lines[10:], tmp_path / "few.list")
    assert "too few pairs of a label for 10 folds; using 4" in capsys.readouterr().err


def test_unusable_embeddings_are_warned_of_and_count_as_errors(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images), 4), float("nan"))

    result = evaluate_list(Broken(), faces, (faces / "pair.list").read_text().splitlines(), tmp_path / "pair.list")
    errors = capsys.readouterr().err
    assert "24 of 24 embeddings are unusable (24 NaN or infinite, 0 zero)" in errors
    assert "20 of 20 pairs lack a usable embedding" in errors and f"{faces}/imgs/0/0." in errors
    assert [result.metrics[name] for name in ("accuracy", "val", "auc", "eer")] == [0, 0, 0, 1]


def test_the_montage_shows_the_worst_pairs(tmp_path: Path) -> None:
    """Pairs of one colour each, at known distances: those on the wrong side of the threshold, the worst ones first."""
    colours = np.arange(40, dtype=np.uint8) * 6
    for i, colour in enumerate(colours):
        Image.fromarray(np.full((112, 112, 3), colour)).save(tmp_path / f"{i}.png")
    lines = [f"{2 * p}.png {2 * p + 1}.png {int(p < 10)}" for p in range(20)]
    (tmp_path / "pair.list").write_text("\n".join(lines))
    distance = np.linspace(0.1, 2, 20)
    distance[3], distance[7], distance[15], distance[12], distance[5] = 1.9, 1.5, 0.2, 0.1, np.nan
    accepts, rejects = PairEvalSet("lfw", PairList(tmp_path, tmp_path / "pair.list")).montage(distance, 1.0)
    assert accepts.title == "lfw: 2 false accepts of 10 pairs (different people, distance below 1.00)"
    assert rejects.title == ("lfw: 2 false rejects of 10 pairs (one person, distance at least 1.00); "
                             "1 without a distance")
    assert [caption for _, _, caption in accepts.pairs] == ["pair 13: distance 0.100", "pair 16: distance 0.200"]
    assert [caption for _, _, caption in rejects.pairs] == ["pair 4: distance 1.900", "pair 8: distance 1.500"]
    draw_montage([accepts, rejects], str(tmp_path / "worst.png"))
    with Image.open(tmp_path / "worst.png") as picture:
        pixels = np.asarray(picture)
    for p in (12, 15, 3, 7):
        for i in (2 * p, 2 * p + 1):
            assert 112 * 112 <= np.count_nonzero((pixels == colours[i]).all(axis=2)) < 1.2 * 112 * 112
    assert not (pixels == colours[0]).all(axis=2).sum() > 5000


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("ARCFACE_REAL_FACES"), reason="ARCFACE_REAL_FACES names no folder of real faces")
def test_pixels_of_real_faces() -> None:
    """1,000 pairs of LFW's first view. A separate literal program gave these accuracies; single-label folds give 0.38
    to 0.56."""
    root = Path(os.environ["ARCFACE_REAL_FACES"]) / "lfw"
    pairs = PairList(str(root / "imgs"), str(root / "pair.list"))
    assert len(pairs) == 1000
    images = PairImages(pairs)
    pixels = np.stack([images[i][0].numpy().reshape(-1) for i in range(len(images))]).astype(np.float32) / 127.5 - 1
    centred = pixels - pixels.mean(1, keepdims=True)
    for embeddings, accuracy in ((pixels, 0.588), (pixels + 1, 0.620), (centred, 0.623)):
        result = evaluate(embeddings[pairs.index1], embeddings[pairs.index2], pairs.is_same)
        assert result.accuracy == pytest.approx(accuracy, abs=0.003)
