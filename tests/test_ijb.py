"""IJB-B and IJB-C from files in the official layout: against a slow pipeline, on several processes, hostile files."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.evaluation import ALONE, CPU, Pixels, save_checkpoint
from helpers.ijb import Layout, random_layout, write_ijb
from helpers.pool import Pool
from torch import nn

import valid
from data.align import TEMPLATE, align_face
from models import build_backbone
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.evaluation.embedding_file import EmbeddingFile
from utils.evaluation.protocol import EvalSet, Result, Source
from utils.evaluation.sets import evaluate_set, open_sets

SETTINGS = {"flip": True, "detector_score": True, "keep_norm": True, "far_nearest": False}


def open_set(root: Path, **settings: bool) -> EvalSet:
    eval_set, = open_sets([Source("ijb", str(root), "--ijb", settings={**SETTINGS, **settings})])
    return eval_set


def photos_of(layout: Layout) -> list[np.ndarray]:
    """A photo per image: blocks of random colors, those of a template similar."""
    rng = np.random.default_rng(3)
    base = {int(t): rng.integers(40, 216, (4, 4, 3)) for t in np.unique(layout.template)}
    blocks = [np.clip(base[int(t)] + rng.integers(-40, 41, (4, 4, 3)), 0, 255).astype(np.uint8)
              for t in layout.template]
    return [block.repeat(36, 0).repeat(36, 1) for block in blocks]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Layout, list[np.ndarray]]:
    rng = np.random.default_rng(5)
    layout = random_layout(rng, subjects=6, pairs=150)
    layout.landmarks = TEMPLATE * rng.uniform(0.7, 1.2, (len(layout.template), 1, 1)) + rng.uniform(
        -3, 20, (len(layout.template), 5, 2))
    photos = photos_of(layout)
    return write_ijb(tmp_path_factory.mktemp("data") / "IJBC", layout, photos), layout, photos


def slow_templates(layout: Layout, photos: list[np.ndarray], flip: bool, detector: bool, norm: bool) -> dict:
    """{template: unit vector}, in plain loops from the photos: Pixels' embedding is the mean color of both halves."""
    vectors: dict[int, dict[int, list[np.ndarray]]] = {}
    assert layout.landmarks is not None
    for i, photo in enumerate(photos):
        face = (align_face(photo, np.round(layout.landmarks[i], 3)).astype(np.float64) / 255 - 0.5) / 0.5
        left, right = face[:, :56].mean((0, 1)), face[:, 56:].mean((0, 1))
        e = np.concatenate([left, right]) + (np.concatenate([right, left]) if flip else 0)
        e = e / (1 if norm else np.linalg.norm(e)) * (layout.score[i] if detector else 1)
        vectors.setdefault(int(layout.template[i]), {}).setdefault(int(layout.media[i]), []).append(e)
    fused = {t: sum(np.mean(rows, axis=0) for rows in medias.values()) for t, medias in vectors.items()}
    return {t: v / np.linalg.norm(v) for t, v in fused.items()}


def check(result: Result, layout: Layout, templates: dict) -> None:
    """The numbers are those of the templates, computed pair by pair and probe by probe."""
    scores = {kind: sorted(float(templates[a] @ templates[b]) for a, b, label in layout.pairs if label == kind)
              for kind in (0, 1)}
    for far, tar in result.json["tar_at_far"].items():
        threshold = scores[0][::-1][int(len(scores[0]) * float(far) + 1e-9)]
        assert tar == pytest.approx(np.mean(np.array(scores[1]) > threshold)), far
        assert result.json["thresholds"][far] == pytest.approx(threshold, abs=1e-5)
    found = result.json["identification"]
    assert list(found) == ["G1", "G2", "mean"]
    for name, gallery in layout.galleries.items():
        hits, mates, others = [], [], []
        for probe, subject in layout.probes:
            score = {s: float(templates[probe] @ templates[t]) for t, s in gallery}
            mate = score.pop(subject, None)
            if mate is None:
                others.append(max(score.values()))
            else:
                hits.append(1 + sum(s >= mate for s in score.values()))
                mates.append(mate)
        for k in (1, 5, 10):
            assert found[name][f"rank_{k}"] == pytest.approx(np.mean([h <= k for h in hits])), (name, k)
        for fpir in (0.1, 0.01):
            threshold = sorted(others)[::-1][int(len(others) * fpir + 1e-9)]
            expected = np.mean([h == 1 and m > threshold for h, m in zip(hits, mates)])
            assert found[name][f"tpir_at_fpir_{fpir:g}"] == pytest.approx(expected), (name, fpir)
    assert found["mean"]["rank_1"] == pytest.approx((found["G1"]["rank_1"] + found["G2"]["rank_1"]) / 2)


@pytest.mark.parametrize("off", ["", "flip", "detector_score", "keep_norm"])
def test_the_numbers_of_a_slow_pipeline(
    off: str, small: tuple[Path, Layout, list[np.ndarray]], tmp_path: Path
) -> None:
    root, layout, photos = small
    settings = {**SETTINGS, **({off: False} if off else {})}
    result = evaluate_set(Pixels(), open_set(root, **settings), ALONE, embeddings=str(tmp_path), batch_size=7,
                          workers=0, flip=settings["flip"], progress=False)
    assert result is not None
    check(result, layout, slow_templates(layout, photos, settings["flip"], settings["detector_score"],
                                         settings["keep_norm"]))
    words = {"": "images added, norm of embeddings kept, detector score used, thresholds whose FAR is at most",
             "flip": "mirrored images not added", "detector_score": "detector score not used",
             "keep_norm": "norm of embeddings removed"}[off]
    assert words in result.report and result.json["settings"] == settings
    assert result.headline == result.json["tar_at_far"]["1e-2"] == result.metrics["tar_at_far_1e-2"]
    assert json.dumps(result.json, allow_nan=False)


def evaluate_on_ranks(rank: int, world_size: int, root: str, embeddings: str) -> tuple[dict | None, int]:
    """(the result, how many images this rank embedded). Each embeds its share, into the same file."""
    backbone, look = Pixels(), EmbeddingFile.missing

    def look_late(file: EmbeddingFile) -> np.ndarray:  # after another rank would have written, if it did not wait
        time.sleep(0.3 * rank)
        return look(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddingFile, "missing", look_late)
        result = evaluate_set(backbone, open_set(Path(root)), DistContext(rank, world_size, world_size, CPU),
                              embeddings=embeddings, batch_size=4, workers=0, flip=True, progress=False)
    return (result.json if result is not None else None), sum(backbone.batches) // 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes(world_size: int, small: tuple[Path, Layout, list[np.ndarray]], tmp_path: Path,
                           pools: Callable[[int], Pool]) -> None:
    root, layout, _ = small
    alone, _ = evaluate_on_ranks(0, 1, str(root), str(tmp_path / "alone"))
    found = pools(world_size).run(evaluate_on_ranks, str(root), str(tmp_path / "shared"))
    assert found[0][0] == alone and [result for result, _ in found[1:]] == [None] * (world_size - 1)
    assert [images for _, images in found] == [-(-len(layout.template) // world_size)] * world_size
    assert (tmp_path / "alone" / "IJBC.embeddings").read_bytes() == (
        tmp_path / "shared" / "IJBC.embeddings").read_bytes()
    again = pools(world_size).run(evaluate_on_ranks, str(root), str(tmp_path / "shared"))
    assert again[0][0] == alone and [images for _, images in again] == [0] * world_size


def embed_on_different_disks(rank: int, world_size: int, root: str, directory: str) -> str:
    context = DistContext(rank, world_size, world_size, torch.device("cpu"))
    try:
        evaluate_set(Pixels(), open_set(Path(root)), context, embeddings=f"{directory}/{rank}", batch_size=50,
                     workers=0, flip=True, progress=False)
    except UserError as error:
        return str(error)
    return ""


def test_nodes_without_a_shared_disk_are_stopped(small: tuple[Path, Layout, list[np.ndarray]], tmp_path: Path,
                                                 pools: Callable[[int], Pool]) -> None:
    """Each node would write only its own half. On the second pass the first node already has a complete file."""
    for _ in range(2):
        messages = pools(2).run(embed_on_different_disks, str(small[0]), str(tmp_path))
        assert len(set(messages)) == 1 and "give a directory on a disk that all nodes share" in messages[0]
        evaluate_on_ranks(0, 1, str(small[0]), str(tmp_path / "0"))
    evaluate_set(Pixels(), open_set(small[0], flip=False), ALONE, embeddings=str(tmp_path / "1"), batch_size=50,
                 workers=0, flip=False, progress=False)  # the other node has an older file, made with other settings
    older = (tmp_path / "1" / "IJBC.embeddings").read_bytes()
    messages = pools(2).run(embed_on_different_disks, str(small[0]), str(tmp_path))
    assert all("is not the file that the first process created" in message for message in messages)
    assert (tmp_path / "1" / "IJBC.embeddings").read_bytes() == older
    for rank in range(2):  # files of one content, of which one is complete
        evaluate_on_ranks(0, 1, str(small[0]), str(tmp_path / str(rank)))
    whole = (tmp_path / "1" / "IJBC.embeddings").read_bytes()
    (tmp_path / "1" / "IJBC.embeddings").write_bytes(whole[:4096] + bytes(28) + whole[4096 + 28:])
    messages = pools(2).run(embed_on_different_disks, str(small[0]), str(tmp_path))
    assert all("the processes see different files" in message for message in messages)


def hand_layout() -> Layout:
    """Templates 10, 20, 30, 40 of one image each, and 50 of two frames of a video."""
    return Layout(
        template=np.array([10, 20, 30, 40, 50, 50]), media=np.array([1, 2, 3, 4, 5, 5]), score=np.ones(6),
        pairs=np.array([[10, 20, 1], [10, 30, 0], [20, 50, 0], *[[30, 40, 0]] * 8]),
        galleries={"G1": np.array([[10, 1], [10, 1], [40, 4]])}, probes=np.array([[20, 1], [50, 4], [30, 3]]))


class Rows:
    """Embeddings in memory, in place of a file."""

    def __init__(self, rows: list[list[float]]) -> None:
        self._rows = np.float32(rows)
        self.shape = self._rows.shape

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._rows[rows]


def test_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cosines: 10-20 0.8, 10-30 0, 20-50 0.6, 30-40 0.6 eight times; 50 is the mean of (0, 2) and (0, 0)."""
    eval_set = open_set(write_ijb(tmp_path / "IJBC", hand_layout()))
    assert eval_set.size == "11 pairs of 5 templates"
    assert "gallery G1 of 2" in eval_set.contents
    result = eval_set.score(Rows([[1, 0], [4, 3], [0, 1], [0.8, 0.6], [0, 2], [0, -1]]))
    # One of ten impostor pairs may be accepted; nine of them are at 0.6, so none is; the genuine one is above.
    assert result.json["tar_at_far"] == {"1e-1": 1.0} and result.json["far"] == {"1e-1": 0.0}
    assert result.json["thresholds"]["1e-1"] == pytest.approx(0.6)
    # Probe 20 (subject 1): 10 at 0.8, 40 at 0.64 + 0.36 = 1: rank 2. Probe 50 (subject 4): 40 at 0.6, 10 at 0: rank 1.
    # Probe 30 has no mate and reaches 0.6: not below the mate of probe 50.
    assert result.json["identification"] == {"G1": {
        "rank_1": 0.5, "rank_5": 1.0, "rank_10": 1.0, "tpir_at_fpir_0.1": 0.0, "tpir_at_fpir_0.01": 0.0}}
    assert re.search(r"TAR, %\s+100.00\n", result.report) and re.search(r"G1\s+50.00\s+100.00", result.report)
    assert capsys.readouterr().err == ""


def test_embeddings_that_cannot_be_used_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eval_set = open_set(write_ijb(tmp_path / "IJBC", hand_layout()))
    result = eval_set.score(Rows([[1, 0], [np.nan, 3], [0, 1], [0.8, 0.6], [0, np.inf], [0, 2]]))
    assert result.json["tar_at_far"] == {"1e-1": 0.0} and result.json["identification"]["G1"]["rank_1"] == 0.5
    assert (result.json["left_out_images"], result.json["empty_templates"]) == (2, 1)
    warnings = capsys.readouterr().err
    assert "2 of 6 embeddings are zero, NaN or infinite" in warnings
    assert "1 of 5 templates have no usable image, the first one: 20; their 2 pairs are never accepted" in warnings
    assert json.dumps(result.json, allow_nan=False)
    assert json.dumps(eval_set.score(Rows([[np.nan, 0]] * 6)).json, allow_nan=False)


def test_landmarks_outside_and_coinciding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Faces outside the photo are black. Images without a transform are left out, and counted."""
    layout = hand_layout()
    layout.landmarks = np.repeat(TEMPLATE[None], 6, axis=0)
    layout.landmarks[1] += 5000
    layout.landmarks[2] = 7
    layout.landmarks[3, 2] = np.nan
    layout.landmarks[4] *= 1e12
    eval_set = open_set(write_ijb(tmp_path / "IJBC", layout, [np.full((120, 120, 3), 200, np.uint8)] * 6))
    assert len(eval_set.images) == 3 and eval_set.images[1][0].max() == 0 and eval_set.images[0][0].min() == 200
    assert "3 of 6 images have landmarks that do not form a face" in capsys.readouterr().err
    eval_set.score(Rows([[1, 0], [0, 1], [1, 1]]))
    assert "2 of 5 templates have no usable image, the first one: 30; their 9 pairs" in capsys.readouterr().err


DAMAGED = [  # (file, what replaces its contents or a function of them, message)
    ("name_5pts_score.txt", b"", "5pts_score.txt: the file is empty"),
    ("name_5pts_score.txt", lambda text: text.replace(b"1.000000\n", b"\n", 1), r"score.txt:1: expected name x1"),
    ("name_5pts_score.txt", lambda text: text.replace(b"3.jpg 4", b"3.jpg x4"), r"score.txt:3: expected name x1"),
    ("name_5pts_score.txt", lambda text: text.replace(b"3.jpg", b"\xff" * 300), "a file name of more than 255 bytes"),
    ("name_5pts_score.txt", lambda text: text.replace(b"4.jpg", b"../4.jpg"), r"tid_mid.txt:4: names '4.jpg'"),
    ("name_5pts_score.txt", b"\n   \n\n", "5pts_score.txt: the file is empty"),
    ("template_pair_label.txt", b"  \n", "label.txt: the file is empty"),
    # As many numbers in all: the last of one line is at the end of the next.
    ("face_tid_mid.txt", lambda text: re.sub(rb"(2.jpg \d+) (\d+)\n([^\n]*)\n", rb"\1\n\3 \2\n", text),
     "tid_mid.txt:2: expected name template media"),
    ("template_pair_label.txt", lambda text: re.sub(rb"^(\d+ \d+) (\d)\n([^\n]*)\n", rb"\1\n\3 \2\n", text),
     "label.txt:1: expected template template 0"),
    ("face_tid_mid.txt", lambda text: text.replace(b"2.jpg", b"9.jpg"), r"tid_mid.txt:2: names '9.jpg'.*'2.jpg'"),
    ("face_tid_mid.txt", lambda text: text[: text.rindex(b"6.jpg")], "has 5 lines, and the list of landmarks 6"),
    ("face_tid_mid.txt", lambda text: text + b"7.jpg 1 1\n", "tid_mid.txt:7: .*no more images"),
    ("face_tid_mid.txt", lambda text: text.replace(b" 40 4", b" 40"), "tid_mid.txt:4: expected name template media"),
    ("face_tid_mid.txt", lambda text: text.replace(b" 40 4", b" 4.0 4"), "tid_mid.txt:4: expected name template media"),
    ("template_pair_label.txt", lambda text: text + b"30 40\n", "label.txt:12: expected template template 0|1, got"),
    ("template_pair_label.txt", lambda text: text + b"\x00\xfe\n", "label.txt:12: expected"),
    ("template_pair_label.txt", lambda text: text.replace(b"20 50 0", b"20 50 2"), "label.txt:3: expected"),
    ("template_pair_label.txt", lambda text: text.replace(b"20 50", b"20 51"), "label.txt:3: template 51 has no image"),
    ("template_pair_label.txt", lambda text: text.replace(b"20 1", b"20 0"), "all pairs have the label 0"),
    ("template_pair_label.txt", lambda text: text.replace(b"20 50", b"20 " + b"9" * 30), "label.txt:3: template"),
    ("1N_gallery_G1.csv", lambda text: text + b"10,2,x\n", "G1.csv:5: template 10 is of subject 1 .* of 2 here"),
    ("1N_gallery_G1.csv", lambda text: text + b"99,2,x\n", "G1.csv:5: template 99 has no image in the list"),
    ("1N_gallery_G1.csv", lambda text: text + b"x,2\n", "G1.csv:5: expected template,subject, got 'x,2'"),
    ("1N_gallery_G1.csv", b"TEMPLATE_ID,SUBJECT_ID\n", "lists no template"),
    ("1N_gallery_G1.csv", lambda text: text + b"50," + b"9" * 40 + b"\n", "more than 64 bits"),
    ("1N_gallery_G1.csv", lambda text: text + b'"' + b"9" * 200_000, "G1.csv:.*is damaged"),
    ("1N_probe_mixed.csv", None, "needs .*probe_mixed.csv and galleries"),
    ("1N_gallery_G1.csv", None, "needs .*probe_mixed.csv and galleries"),
    ("template_pair_label.txt", None, "label.txt: cannot be read .No such file"),
    ("face_tid_mid.txt", None, "needs loose_crop/ and meta/ with one file"),
]


@pytest.mark.parametrize("file, change, message", DAMAGED, ids=[str(i) for i in range(len(DAMAGED))])
def test_damaged_files_give_one_line(file: str, change: object, message: str, tmp_path: Path) -> None:
    root = write_ijb(tmp_path / "IJBC", hand_layout())
    path = root / "meta" / f"ijbc_{file}"
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()) if callable(change) else change)
    with pytest.raises(UserError, match=message) as caught:
        open_set(root)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("--ijb")


def test_a_csv_without_a_header_loses_no_entry(tmp_path: Path) -> None:
    root = write_ijb(tmp_path / "IJBC", hand_layout())
    before = open_set(root).contents
    for path in (root / "meta").glob("*_1N_*.csv"):
        path.write_text(path.read_text().partition("\n")[2])
    assert open_set(root).contents == before


def test_blank_lines_and_files_without_a_last_line_end(tmp_path: Path) -> None:
    root = write_ijb(tmp_path / "IJBC", hand_layout())
    for number, path in enumerate(sorted((root / "meta").glob("*.txt"))):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\n\n" if number else path.read_bytes()[:-1])
    assert open_set(root).size == "11 pairs of 5 templates"


def test_files_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_ijb(tmp_path / "IJBC", hand_layout())
    whole = open_set(root)
    monkeypatch.setattr("utils.evaluation.ijb._BLOCK", 100)
    parts = open_set(root)
    for name in ("_first", "_second", "_is_same", "_template", "_media", "_scores"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name
    assert whole.fingerprint == parts.fingerprint == pickle.loads(pickle.dumps(parts)).fingerprint  # ranks get a copy
    path = root / "meta" / "ijbc_template_pair_label.txt"
    path.write_bytes(path.read_bytes() + b"30 40\n")
    with pytest.raises(UserError, match="label.txt:12: "):
        open_set(root)
    path.write_bytes(b"1" * 300)
    with pytest.raises(UserError, match="a line of more than 16 MiB"):
        open_set(root)
    for name in ("template_pair_label.txt", "1N_gallery_G1.csv", "name_5pts_score.txt"):
        path = root / "meta" / f"ijbc_{name}"
        with path.open("wb") as file:
            file.truncate(2**30 + 1)
        with pytest.raises(UserError, match=f"{path.name}: .*should have 1,073,741,824 at most"):
            open_set(root)
        path.write_text("10 20 1\n10 30 0\n")


def test_missing_images_and_wrong_directories(tmp_path: Path) -> None:
    root = write_ijb(tmp_path / "IJB" / "IJBC", hand_layout())
    with pytest.raises(UserError, match=f"--ijb {tmp_path}/IJB: needs loose_crop/ .*; give {root}"):
        open_set(tmp_path / "IJB")
    (root / "loose_crop" / "2.jpg").unlink()
    with pytest.raises(UserError, match="1 of 6 images are missing, the first one: .*/2.jpg"):
        open_set(root)


def test_sets_without_identification(tmp_path: Path) -> None:
    layout = hand_layout()
    layout.galleries, layout.probes = {}, np.empty((0, 2), int)
    eval_set = open_set(write_ijb(tmp_path / "IJBB", layout))
    assert "no files for 1:N" in eval_set.contents
    result = eval_set.score(Rows([[1, 0], [4, 3], [0, 1], [0.8, 0.6], [0, 2], [0, -1]]))
    assert result.json["identification"] == {} and "1:N" not in result.report


class Stops(Pixels):
    """Fails after three batches, as a machine may."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(self.batches) == 3:
            raise RuntimeError("stopped")
        return super().forward(images)


def test_only_what_is_missing_is_embedded(
    small: tuple[Path, Layout, list[np.ndarray]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing or damaged, and all if the weights, the settings or the images are others."""
    root, layout, _ = small
    images = len(layout.template)

    def run(backbone: nn.Module, flip: bool = False) -> int:
        """How many images were embedded. (Another one shows the size of an embedding.)"""
        evaluate_set(backbone, open_set(root, flip=flip), ALONE, embeddings=str(tmp_path), batch_size=5, workers=0,
                     flip=flip, progress=False)
        assert isinstance(backbone, Pixels)
        return sum(backbone.batches) - 1

    path = tmp_path / "IJBC.embeddings"
    assert run(Pixels()) == images and run(Pixels()) == 0
    assert f"holds the embeddings of {images} of {images} images" in capsys.readouterr().out
    whole = path.read_bytes()
    record = 4 + 4 * 6
    damaged = bytearray(whole)
    damaged[4096 + 7 * record + 5] ^= 1  # a value of image 7
    damaged[4096 + 9 * record : 4096 + 11 * record] = bytes(2 * record)  # images 9 and 10 were not written
    path.write_bytes(damaged)
    assert run(Pixels()) == 3 and path.read_bytes() == whole
    path.write_bytes(whole[:-50])
    assert run(Pixels()) == images and path.read_bytes() == whole
    other = Pixels()
    other.frozen.running_mean += 1  # a statistic, which these embeddings do not use
    assert run(other) == images and run(Pixels()) == images
    assert run(Pixels(), flip=True) == 2 * images
    os.utime(root / "loose_crop" / "2.jpg", ns=(1, 1))  # it was written over
    assert run(Pixels()) == images


def test_a_stopped_run_keeps_its_batches(small: tuple[Path, Layout, list[np.ndarray]], tmp_path: Path) -> None:
    root, layout, _ = small
    backbone = Stops()
    for expected in (2, 4):  # batches that are stored: one of the three shows the size of an embedding
        backbone.batches.clear()
        with pytest.raises(RuntimeError, match="stopped"):
            evaluate_set(backbone, open_set(root, flip=False), ALONE, embeddings=str(tmp_path), batch_size=5,
                         workers=0, flip=False, progress=False)
        content = (tmp_path / "IJBC.embeddings").read_bytes()[4096:]
        records = np.frombuffer(content, np.uint8).reshape(len(layout.template), -1)
        assert np.flatnonzero(records.any(axis=1)).tolist() == list(range(5 * expected))


def test_files_that_cannot_hold_embeddings(small: tuple[Path, Layout, list[np.ndarray]], tmp_path: Path) -> None:
    root = small[0]

    def run(directory: Path) -> None:
        evaluate_set(Pixels(), open_set(root), ALONE, embeddings=str(directory), batch_size=50, workers=0, flip=True,
                     progress=False)

    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="--embeddings: .*cannot be used"):
        run(tmp_path / "file")
    (tmp_path / "IJBC.embeddings").write_bytes(b"a photo")
    with pytest.raises(UserError, match="is no file of embeddings"):
        run(tmp_path)
    assert (tmp_path / "IJBC.embeddings").read_bytes() == b"a photo"
    (tmp_path / "IJBC.embeddings").unlink()
    (tmp_path / "IJBC.embeddings").symlink_to(tmp_path / "file")
    with pytest.raises(UserError, match="is a link; remove it"):
        run(tmp_path)
    (tmp_path / "IJBC.embeddings").unlink()
    run(tmp_path)
    held = EmbeddingFile(str(tmp_path / "held" / "IJBC.embeddings"), 3, 2, {"weights": "x"})
    with pytest.raises(UserError, match="another process is writing there"):
        run(tmp_path / "held")
    held.close()
    run(tmp_path / "held")


def test_valid_prints_and_writes_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = random_layout(np.random.default_rng(0), subjects=2, pairs=60)
    root = write_ijb(tmp_path / "IJBC", layout, photos_of(layout))
    torch.manual_seed(3)
    save_checkpoint(build_backbone("mobilefacenet"), tmp_path / "checkpoint.pth.tar")
    written = []
    for more in ([], ["--far-nearest"]):
        monkeypatch.setattr(sys, "argv", [
            "valid.py", "--ijb", str(root), "--resume", str(tmp_path / "checkpoint.pth.tar"), "--device", "cpu", "-j",
            "0", "--embeddings", str(tmp_path / "cache"), "--json", str(tmp_path / "report" / "result.json"),
            "--report", str(tmp_path / "report"), *more])
        valid.main()
        out = capsys.readouterr().out
        written.append(json.loads((tmp_path / "report" / "result.json").read_text(), parse_constant=pytest.fail))
        assert ("embedded" in out) == (not more), "embeddings are kept"
        assert ("mirrored images added, norm of embeddings kept, detector score used, "
                + ("the point of the ROC curve nearest" if more else "thresholds whose FAR is at most")) in out
        assert f"TAR, %   {100 * written[-1]['tar_at_far']['1e-1']:9.2f}" in out and "1:N, %" in out
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<svg") >= 2 and "pairs of templates, without intervals" in page
    assert list(written[0]["tar_at_far"]) == ["1e-1"] and len(written[1]["tar_at_far"]) == 6
    assert written[0]["far"]["1e-1"] <= 0.1


@pytest.mark.parametrize("argv, message", [
    (["--bin", "x.bin", "--far-nearest"], "--far-nearest: has no effect without --ijb"),
    (["--bin", "x.bin", "--no-keep-norm"], "--no-keep-norm: has no effect"),
    (["--bin", "x.bin", "--no-detector-score"], "--no-detector-score: has no effect"),
    (["--bin", "x.bin", "--embeddings", "x"], "--embeddings x: has no effect"),
    (["--bin", "x.bin", "--tinyface-imgs", "x"], "--tinyface-imgs x: has no effect without --tinyface"),
    (["--ijb", "x", "--far", "1e-4"], "--far: these sets have no scores of pairs"),
    (["--bin", "x", "--report", "r", "--json", "r/report.json"], "--json r/report.json: is also the file of --report"),
    (["--ijb", "x", "--montage", "x.png"], "--montage x.png: these sets have no pairs of images"),
    (["--tinyface", "x", "--plot", "x.png"], "--plot x.png: these sets have no ROC curve"),
    (["--ijb", "x", "--pair-list", "y"], "--imgs-root is missing"),
    ([], "--imgs-root is missing.*--bin FILE, --ijb DIR or --tinyface DIR"),
])
def test_flags_without_effect(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        valid.parse_options(["--untrained", "-a", "mobilefacenet", *argv])


def test_mirrored_images_are_the_default_of_these_protocols() -> None:
    model = ["--untrained", "-a", "mobilefacenet"]
    flips = [valid.parse_options([*model, *argv]).flip for argv in (
        ["--bin", "x.bin"], ["--bin", "x.bin", "--flip"], ["--ijb", "x"], ["--tinyface", "x"],
        ["--ijb", "x", "--no-flip"])]
    assert flips == [False, True, True, True, False]
