"""valid.py and scripts/embed.py as their users see them, and embed_images."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import valid
from data.pairs import PairImages, PairList
from models import build_backbone
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.evaluation.embed import buffers_of_rank_0, choose_device, embed_images, embed_images_together
from utils.evaluation.lfw import evaluate

ROOT = Path(__file__).resolve().parent.parent
FOUR_LINES = (
    r"Accuracy: \d\.\d{5}\+-\d\.\d{5}\n"
    r"Validation rate: \d\.\d{5}\+-\d\.\d{5} @ FAR=\d\.\d{5}\n"
    r"Area Under Curve \(AUC\): \d\.\d{3}\n"
    r"Equal Error Rate \(EER\): \d\.\d{3}\n$"
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """imgs/, pair.list (10 same, 10 different pairs of 8 identities) and checkpoint.pth.tar of a MobileFaceNet."""
    root = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for identity in range(8):
        base = rng.integers(0, 256, (7, 7, 3))
        (root / "imgs" / str(identity)).mkdir(parents=True)
        for image in range(3):
            pixels = np.clip(base + rng.integers(-40, 40, (7, 7, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((112, 112)).save(root / "imgs" / str(identity) / f"{image}.jpg")
    same = [f"{k % 8}/{k // 8}.jpg {k % 8}/2.jpg 1" for k in range(10)]
    different = [f"{k % 8}/0.jpg {(k + 1 + k // 8) % 8}/1.jpg 0" for k in range(10)]
    (root / "pair.list").write_text("\n".join(same + different) + "\n")

    torch.manual_seed(3)
    backbone = build_backbone("mobilefacenet")
    save_checkpoint(backbone, root / "checkpoint.pth.tar")
    return root


def save_checkpoint(backbone: nn.Module, path: Path) -> None:
    torch.save({
        "format_version": 1, "arch": "mobilefacenet", "embedding_size": 512, "num_classes": 8,
        "state_dict": backbone.state_dict(),
    }, path)


def arguments(faces: Path, *more: str) -> list[str]:
    return ["--imgs-root", str(faces / "imgs"), "--pair-list", str(faces / "pair.list"), "--device", "cpu", *more]


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[str, str]:
    """valid.py in this process: (stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["valid.py", *argv])
    valid.main()
    return capsys.readouterr()


def script(cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=environment, text=True, capture_output=True, timeout=300
    )


# ---------------------------------------------------------------------------------------------------------------------
# embed_images


class Pixels(nn.Module):
    """Mean pixel of the left and of the right half, per channel: an embedding that can be computed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.BatchNorm2d(3).eval()
        self.batches: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled() and images.dtype == self.scale.dtype
        self.batches.append(len(images))
        return torch.cat([images[..., :56].mean((2, 3)), images[..., 56:].mean((2, 3))], dim=1) * self.scale


class Colours(Dataset):
    """Image i: left half of one colour, right half of another; item 13 cannot be read if `broken`."""

    def __init__(self, count: int, broken: bool = False) -> None:
        self.colours = np.random.default_rng(0).integers(0, 256, (count, 3, 2), dtype=np.uint8)
        self.broken = broken

    def __len__(self) -> int:
        return len(self.colours)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        assert torch.utils.data.get_worker_info() is None or torch.get_num_threads() == 1
        if self.broken and i == 13:
            raise UserError("13.jpg: the file is empty")
        return torch.from_numpy(np.repeat(self.colours[i], 56, axis=1)[:, None].repeat(112, axis=1)), 0

    def expected(self, flip: bool) -> np.ndarray:
        pixels = (self.colours / 255 - 0.5) / 0.5
        embedding = pixels.transpose(0, 2, 1).reshape(len(self), 6)
        if flip:
            embedding = embedding + pixels[:, :, ::-1].transpose(0, 2, 1).reshape(len(self), 6)
        return embedding / np.linalg.norm(embedding, axis=1, keepdims=True)


@pytest.mark.filterwarnings("error::UserWarning")  # torch's, where there are more workers than cores
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("batch_size, workers", [(8, 0), (1, 12), (7, 3), (64, 2)])
def test_embed_images(flip: bool, batch_size: int, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    images, backbone = Colours(20), Pixels().train()
    backbone.frozen.eval()
    embeddings = embed_images(
        backbone, images, batch_size=batch_size, workers=workers, device=CPU, flip=flip, progress=False
    )
    assert embeddings.dtype == np.float32 and embeddings.shape == (20, 6)
    np.testing.assert_allclose(embeddings, images.expected(flip), atol=1e-6)
    assert sum(backbone.batches) == 20 * (1 + flip) and max(backbone.batches) == min(batch_size, 20)
    assert backbone.training and not backbone.frozen.training  # each module as it was
    assert capsys.readouterr() == ("", "")


def test_embed_images_in_the_backbones_precision() -> None:
    images = Colours(5)
    embeddings = embed_images(Pixels().double(), images, batch_size=2, workers=0, device=CPU, progress=False)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, images.expected(False), atol=1e-7)


def test_progress_is_a_line_each_print_freq_batches(capsys: pytest.CaptureFixture[str]) -> None:
    embed_images(Pixels(), Colours(20), batch_size=3, workers=0, device=CPU, print_freq=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" images,")[0] for line in lines] == [f"embedded {done}/20" for done in (6, 12, 18, 20)]
    assert all(line.endswith(" images/s") for line in lines)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_one_clean_error(workers: int) -> None:
    backbone = Pixels().train()
    with pytest.raises(UserError) as caught:
        embed_images(backbone, Colours(20, broken=True), batch_size=4, workers=workers, device=CPU, progress=False)
    assert str(caught.value) == "13.jpg: the file is empty"
    assert backbone.training


def test_no_images() -> None:
    with pytest.raises(ValueError, match="no images"):
        embed_images(Pixels(), Colours(0), batch_size=4, workers=0, device=CPU)


def test_unusable_embeddings_become_zero_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    images, backbone = Colours(20), Pixels()
    factor = torch.ones(20)
    factor[2], factor[5], factor[7], factor[9], factor[11] = float("nan"), float("inf"), 0, 1e-30, 1e30

    def spoil(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output * factor[:, None]

    backbone.register_forward_hook(spoil)
    embeddings = embed_images(backbone, images, batch_size=20, workers=0, device=CPU, progress=False)
    usable = np.isin(np.arange(20), (2, 5, 7), invert=True)
    np.testing.assert_allclose(embeddings, images.expected(False) * usable[:, None], atol=1e-6)
    assert capsys.readouterr().err == (
        "warning: 3 of 20 embeddings are unusable (2 NaN or infinite, 1 zero); they are set to zero\n"
    )


def embed_together(rank: int, world_size: int, count: int, factors: list[float]) -> tuple[np.ndarray, str]:
    context = DistContext(rank, world_size, world_size, CPU)
    backbone = Pixels()
    backbone.register_forward_hook(lambda module, args, output: output * factor_of(args[0], factors))
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        rows = embed_images_together(context, backbone, Colours(count), batch_size=3, workers=0, progress=False)
    return rows, errors.getvalue()


def factor_of(images: torch.Tensor, factors: list[float]) -> torch.Tensor:
    """(n, 1): the entry of `factors` for the image's number, which is found by its first pixel."""
    first = (Colours(len(factors)).colours[:, :, 0] / 255 - 0.5) / 0.5
    number = (images[:, None, :, 0, 0] - torch.from_numpy(first).float()).abs().sum(2).argmin(1)
    return torch.tensor(factors)[number][:, None]


@pytest.mark.parametrize("world_size, count", [(2, 20), (3, 20), (3, 7), (3, 2), (2, 1)])
def test_ranks_share_the_images(pools, world_size: int, count: int) -> None:
    """All ranks get what one process computes; what is unusable is counted once, although the last image fills up."""
    factors = [1.0] * count
    factors[-1] = float("nan")
    if count > 5:
        factors[4] = 0.0
    everywhere = pools(world_size).run(embed_together, count, factors)
    usable = np.array(factors) == 1
    for embeddings, _ in everywhere:
        np.testing.assert_allclose(embeddings, Colours(count).expected(False) * usable[:, None], atol=1e-6)
    warning = f"warning: {count - usable.sum()} of {count} embeddings are unusable (1 NaN or infinite, {int(count > 5)} zero)"
    assert warning in everywhere[0][1] and not any(errors for _, errors in everywhere[1:])


def borrow_buffers(rank: int, world_size: int) -> tuple[list[float], list[float], list[float]]:
    module = nn.BatchNorm1d(2)
    module.running_mean += 10 * rank + 0.1
    module.num_batches_tracked += rank
    state = [[float(module.running_mean[0]), int(module.num_batches_tracked)]]
    with buffers_of_rank_0(DistContext(rank, world_size, world_size, CPU), module):
        state.append([float(module.running_mean[0]), int(module.num_batches_tracked)])
    return *state, [float(module.running_mean[0]), int(module.num_batches_tracked)]


def test_buffers_of_rank_0(pools) -> None:
    for rank, (before, within, after) in enumerate(pools(2).run(borrow_buffers)):
        assert within == pytest.approx([0.1, 0]) and after == before
        assert (within == before) == (rank == 0)


def test_embedding_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    embed_images(Pixels(), Colours(4), batch_size=2, workers=1, device=CPU, progress=False)
    assert (torch.get_rng_state() == state).all()


def test_choose_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(UserError, match="--device cuda"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == CPU


# ---------------------------------------------------------------------------------------------------------------------
# valid.py


def test_the_published_command(faces: Path, tmp_path: Path) -> None:
    """Verbatim but for the paths; in a process of its own, which imports neither torchshard nor the losses."""
    result = script(
        tmp_path, "-X", "importtime", str(ROOT / "valid.py"), "--batch-size", "1024", "-workers", "16",
        "--imgs-root", str(faces / "imgs"), "--pair-list", str(faces / "pair.list"),
        "--resume", str(faces / "checkpoint.pth.tar"), "--json", "result.json",
    )
    assert result.returncode == 0, result.stderr
    assert re.search(FOUR_LINES, result.stdout)
    assert f"mobilefacenet of {faces}/checkpoint.pth.tar" in result.stdout
    assert f"20 pairs of {faces}/pair.list, 10 of them same, 24 images" in result.stdout
    assert "embedded 24/24 images" in result.stdout and "=> evaluated in " in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "utils.evaluation.lfw" in imported
    assert not {name for name in imported if name.split(".")[0] in ("torchshard", "losses")}
    noise = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert noise == []
    assert os.listdir(tmp_path) == ["result.json"]

    written = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    numbers = {"accuracy", "accuracy_std", "val", "val_std", "far", "auc", "eer", "exact_accuracy", "exact_accuracy_std"}
    assert set(written) == {*numbers, "thresholds", "tpr", "fpr", "threshold", "tar_at_far", "undecidable_pairs"}
    assert f"Accuracy: {written['accuracy']:.5f}" in result.stdout


def test_the_numbers_are_those_of_the_backbone(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "result.json"
    run(capsys, monkeypatch, *arguments(
        faces, "--resume", str(faces / "checkpoint.pth.tar"), "-j", "0", "-b", "5", "--flip", "--json", str(output)
    ))

    pairs = PairList(str(faces / "imgs"), str(faces / "pair.list"))
    torch.manual_seed(3)
    backbone = build_backbone("mobilefacenet").eval()
    images = torch.stack([PairImages(pairs)[i][0] for i in range(len(pairs.paths))]).float().div(127.5).sub(1)
    with torch.no_grad():
        embeddings = (backbone(images) + backbone(images.flip(3))).numpy()
    expected = evaluate(embeddings[pairs.index1], embeddings[pairs.index2], pairs.is_same)
    written = json.loads(output.read_text())
    assert written["accuracy"] == pytest.approx(expected.accuracy, abs=0.051)  # one pair that rounding moved
    assert written["auc"] == pytest.approx(expected.auc, abs=0.02)


def test_untrained_baseline(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seed decides; seed 3 is what the checkpoint of these tests holds."""
    written = []
    for i, source in enumerate((["--untrained", "-a", "mobilefacenet", "--seed", "3"],
                                ["--resume", str(faces / "checkpoint.pth.tar")])):
        output = tmp_path / f"{i}.json"
        out, _ = run(capsys, monkeypatch, *arguments(faces, "--workers", "1", *source, "--json", str(output)))
        assert ("untrained mobilefacenet, seed 3" in out) == (i == 0)
        written.append(output.read_text())
    assert written[0] == written[1]


def test_a_nan_backbone_is_warned_of_and_scores_nothing(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = build_backbone("mobilefacenet")
    for parameter in backbone.parameters():
        nn.init.constant_(parameter, float("nan"))
    save_checkpoint(backbone, tmp_path / "nan.pth.tar")
    output = tmp_path / "result.json"
    out, err = run(capsys, monkeypatch, *arguments(
        faces, "--resume", str(tmp_path / "nan.pth.tar"), "-j", "0", "--json", str(output)
    ))
    assert re.search(FOUR_LINES, out)
    assert "24 of 24 embeddings are unusable (24 NaN or infinite, 0 zero)" in err
    assert f"20 of 20 pairs lack a usable embedding and count as errors; the first such image: {faces}/imgs/0/0." in err
    written = json.loads(output.read_text(), parse_constant=pytest.fail)
    assert (written["accuracy"], written["val"], written["auc"], written["eer"]) == (0, 0, 0, 1)


def test_a_collapsed_backbone_is_warned_of(faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Constant(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(images), 4)

    (faces / "more.list").write_text((faces / "pair.list").read_text() * 2)
    pairs = PairList(str(faces / "imgs"), str(faces / "more.list"))
    result = valid.validate(Constant(), pairs, batch_size=8, workers=0, device=CPU, flip=False, print_freq=100)
    assert result.accuracy == 0.5
    assert "the validation rate means little: the false accept rate is 1.00000" in capsys.readouterr().err


def test_few_pairs_are_warned_of(faces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (faces / "pair.list").read_text().splitlines()
    (faces / "few.list").write_text("\n".join(lines[:4] + lines[10:]))
    pairs = PairList(str(faces / "imgs"), str(faces / "few.list"))
    valid.validate(Pixels(), pairs, batch_size=8, workers=0, device=CPU, flip=False, print_freq=100)
    assert "too few pairs of a label for 10 folds; using 4" in capsys.readouterr().err


def test_json_replaces_the_old_file_whole_or_not_at_all(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "result.json"
    output.write_text("old")
    command = arguments(faces, "--untrained", "-a", "mobilefacenet", "-j", "0", "--json", str(output))

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="result.json: cannot be written .No space"):
        patch.setattr(os, "fsync", fail)
        run(capsys, patch, *command)
    assert re.search(FOUR_LINES, capsys.readouterr().out)  # the result is not lost with the file
    assert output.read_text() == "old" and os.listdir(tmp_path) == ["result.json"]
    run(capsys, monkeypatch, *command)
    assert json.loads(output.read_text()) and os.listdir(tmp_path) == ["result.json"]


def pack(faces: Path, path: Path) -> None:
    """The pairs of `faces` as a .bin."""
    images, labels = [], []
    for line in (faces / "pair.list").read_text().splitlines():
        path1, path2, label = line.split()
        images += [(faces / "imgs" / path1).read_bytes(), (faces / "imgs" / path2).read_bytes()]
        labels.append(label == "1")
    path.write_bytes(pickle.dumps((images, labels), 2))


def test_several_sets_pictures_and_processes(faces: Path, tmp_path: Path) -> None:
    """A list and a .bin of the same pairs, by two processes: the same numbers, headed by the sets' names."""
    pack(faces, tmp_path / "packed.bin")
    result = script(
        tmp_path, str(ROOT / "valid.py"), *arguments(faces, "--bin", "packed.bin"),
        "--resume", str(faces / "checkpoint.pth.tar"), "-j", "2", "-b", "5", "--multiprocessing-distributed", "--nproc-per-node", "2", "--json", "both.json",
        "--plot", "roc.png", "--montage", "worst.png",
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    four = FOUR_LINES.removesuffix("$")
    assert re.search(f"^{re.escape(faces.name)}\n{four}packed\n{four}$", result.stdout, re.MULTILINE), result.stdout
    assert "2 processes, each cpu" in result.stdout and result.stdout.count("embedded 12/12 images of rank 0, ") == 2
    sets = json.loads((tmp_path / "both.json").read_text(), parse_constant=pytest.fail)["sets"]
    assert list(sets) == [faces.name, "packed"] and sets[faces.name] == sets["packed"]
    assert result.stdout.count(f"Accuracy: {sets['packed']['accuracy']:.5f}") == 2
    for name in ("roc.png", "worst.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 800


def test_a_bin_alone_gives_the_numbers_of_its_pairs(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(faces, tmp_path / "packed.bin")
    model = ("--resume", str(faces / "checkpoint.pth.tar"), "--device", "cpu", "-j", "0")
    outputs = [run(capsys, monkeypatch, *source, *model, "--json", str(tmp_path / f"{i}.json"))[0] for i, source in enumerate((
        ["--bin", str(tmp_path / "packed.bin")], ["--imgs-root", str(faces / "imgs"), "--pair-list", str(faces / "pair.list")],
    ))]
    results = [re.search(FOUR_LINES, output) for output in outputs]
    assert results[0] and results[1] and results[0].group() == results[1].group()
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()
    assert re.search(r"=> packed: accuracy at exact thresholds \d\.\d{5}\+-\d\.\d{5}; TAR at FAR 1e-1 \d\.\d{5}\n", outputs[0])


def test_the_montage_shows_the_worst_pairs(tmp_path: Path) -> None:
    """Pairs of one colour each, at known distances: those on the wrong side of the threshold, the worst ones first."""
    colours = np.arange(40, dtype=np.uint8) * 6
    images = [np.broadcast_to(colour, (112, 112, 3)) for colour in colours]
    for i, image in enumerate(images):
        Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / f"{i}.png")
    lines = [f"{2 * p}.png {2 * p + 1}.png {int(p < 10)}" for p in range(20)]
    (tmp_path / "pair.list").write_text("\n".join(lines))
    pairs = PairList(tmp_path, tmp_path / "pair.list")
    distance = np.linspace(0.1, 2, 20)
    distance[3], distance[7], distance[15], distance[12], distance[5] = 1.9, 1.5, 0.2, 0.1, np.nan
    accepts, rejects = valid.montage_sections("lfw", pairs, distance, 1.0)
    assert accepts.title == "lfw: 2 false accepts of 10 pairs (different people, distance below 1.00)"
    assert rejects.title == "lfw: 2 false rejects of 10 pairs (one person, distance at least 1.00); 1 without a distance"
    assert [caption for _, _, caption in accepts.pairs] == ["pair 13: distance 0.100", "pair 16: distance 0.200"]
    assert [caption for _, _, caption in rejects.pairs] == ["pair 4: distance 1.900", "pair 8: distance 1.500"]
    valid.draw_montage([accepts, rejects], str(tmp_path / "worst.png"))
    with Image.open(tmp_path / "worst.png") as picture:
        pixels = np.asarray(picture)
    for p in (12, 15, 3, 7):
        for i in (2 * p, 2 * p + 1):
            assert 112 * 112 <= np.count_nonzero((pixels == colours[i]).all(axis=2)) < 1.2 * 112 * 112
    assert not (pixels == colours[0]).all(axis=2).sum() > 5000


MISTAKES = [
    (["--untrained", "-a", "mobilefacenet", "--bin", "none.bin"], "none.bin: cannot be read"),
    (["--untrained", "-a", "mobilefacenet", "--bin", "a.bin,"], "--bin: 'a.bin,' is not a comma-separated list of files"),
    (["--untrained", "-a", "mobilefacenet", "--bin", "{faces}/pair.list"], "pair.list: is not an evaluation set"),
    (["--untrained", "-a", "mobilefacenet", "--bin", "a.bin", "--pair-list", ""], "--pair-list is missing"),
    (["--untrained", "-a", "mobilefacenet", "--nproc-per-node", "2"], "--nproc-per-node 2: add --multiprocessing-distrib"),
    (["--untrained", "-a", "mobilefacenet", "--nproc-per-node", "0"], "--nproc-per-node 0: give a number of at least 1"),
    (["--untrained", "-a", "mobilefacenet", "--plot", "roc.gif"], "--plot roc.gif: the name must end in .png, .svg or .pdf"),
    (["--untrained", "-a", "mobilefacenet", "--montage", "x.svg"], "--montage x.svg: the name must end in .png or .jpg"),
    (["--untrained", "-a", "mobilefacenet", "--plot", "/nowhere/x.png"], "--plot /nowhere/x.png: there is no directory"),
    (["--untrained", "-a", "mobilefacenet", "--montage", "/nowhere/x.png"], "--montage /nowhere/x.png: there is no dir"),
    (["--resume", ""], "--resume is missing"),
    ([], "--resume is missing: .* or --untrained with -a ARCH"),
    (["--resume", "nothing.pth.tar"], "--resume nothing.pth.tar: no such file"),
    (["--resume", "{faces}/checkpoint.pth.tar", "--untrained", "-a", "iresnet18"], "--untrained with --resume .*: ch"),
    (["--untrained"], "--untrained: give the architecture with -a"),
    (["--untrained", "-a", "vgg"], "--arch vgg is unknown; choose one of iresnet18, .*mobilefacenet"),
    (["--resume", "{faces}/checkpoint.pth.tar", "-a", "iresnet18"], "iresnet18"),
    (["--resume", "{faces}/pair.list"], "pair.list"),
    (["--resume", "{faces}"], "directory"),
    (["--untrained", "-a", "mobilefacenet", "-b", "0"], "--batch-size 0: give a number of at least 1"),
    (["--untrained", "-a", "mobilefacenet", "-j", "-1"], "--workers -1: give a number of at least 0"),
    (["--untrained", "-a", "mobilefacenet", "-p", "0"], "--print-freq 0"),
    (["--untrained", "-a", "mobilefacenet", "--seed", "-1"], "--seed -1"),
    (["--untrained", "-a", "mobilefacenet", "--seed", str(2**63)], "--seed 9223372036854775808"),
    (["--untrained", "-a", "mobilefacenet", "-b", "many"], "-b/--batch-size: invalid int value: 'many'"),
    (["--untrained", "-a", "mobilefacenet", "--batch", "8"], "unrecognized arguments: --batch 8"),
    (["--untrained", "-a", "mobilefacenet", "--json", "{faces}/none/result.json"], "--json .*: there is no directory"),
    (["--untrained", "-a", "mobilefacenet", "--json", "{faces}"], "--json .*: is not a file"),
    (["--untrained", "-a", "mobilefacenet", "--json", "/dev/null"], "--json /dev/null: is not a file"),
    (["--untrained", "-a", "mobilefacenet", "--device", "cuda"], "--device cuda: PyTorch sees no GPU"),
    (["--untrained", "-a", "mobilefacenet", "--device", "tpu"], "--device: invalid choice: 'tpu'"),
    (["--untrained", "-a", "mobilefacenet", "--imgs-root", ""], "--imgs-root is missing"),
    (["--untrained", "-a", "mobilefacenet", "--pair-list", ""], "--pair-list is missing"),
    (["--untrained", "-a", "mobilefacenet", "--imgs-root", "/nowhere"], "--imgs-root /nowhere: no such directory"),
    (["--untrained", "-a", "mobilefacenet", "--pair-list", "/nowhere"], "--pair-list /nowhere: cannot be read"),
    (["--untrained", "-a", "mobilefacenet", "--imgs-root", "{faces}"], r"pair\.list:1: there is no image"),
]


@pytest.mark.parametrize("argv, message", MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_mistakes_are_found_before_anything_is_embedded(
    argv: list[str], message: str, faces: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(valid, "embed_images", lambda *_, **__: pytest.fail("embedded"))
    monkeypatch.setattr(valid, "build_backbone", lambda *_: pytest.fail("built a backbone"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message) as caught:
        run(capsys, monkeypatch, *arguments(faces), *(part.format(faces=faces) for part in argv))
    assert "\n" not in str(caught.value)


def test_pair_mistakes_are_found_before_the_checkpoint_is_read(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(valid, "open_weights", lambda *_: pytest.fail("read the checkpoint"))
    (tmp_path / "pair.list").write_text("0/0.jpg 0/1.jpg 1\n1/0.jpg 1/1.jpg\n")
    with pytest.raises(UserError, match=r"pair\.list:2: expected"):
        run(capsys, monkeypatch, "--imgs-root", str(faces / "imgs"), "--pair-list", str(tmp_path / "pair.list"),
            "--resume", str(faces / "checkpoint.pth.tar"))


@pytest.mark.parametrize("flags", [[], ["--multiprocessing-distributed", "--nproc-per-node", "2"]], ids=["one", "two"])
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path: Path, flags: list[str]) -> None:
    bad = tmp_path
    (bad / "0").mkdir(parents=True)
    for image in range(4):
        Image.new("RGB", (112, 112 - image // 3)).save(bad / "0" / f"{image}.png")
    (bad / "pair.list").write_text("0/0.png 0/1.png 1\n0/1.png 0/2.png 1\n0/0.png 0/3.png 0\n0/1.png 0/3.png 0\n")
    result = script(
        ROOT, "valid.py", "--imgs-root", str(bad), "--pair-list", str(bad / "pair.list"), "--device", "cpu",
        "--untrained", "-a", "mobilefacenet", "-workers", "2", *flags,
    )
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if not line.startswith("warning: too few pairs")]
    assert len(errors) == 1 and re.match(r"error: .*3\.png: .*112x111", errors[0])


# ---------------------------------------------------------------------------------------------------------------------
# scripts/embed.py


def test_embed_script_writes_embeddings_and_paths(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "more" / "deep").mkdir(parents=True)
    for name in ("more/deep/b.png", "more/a.png", "more/.hidden.png"):
        Image.new("RGB", (112, 112), (len(name), 90, 0)).save(tmp_path / name)
    (tmp_path / "more/notes.txt").write_text("no image")
    single = str(faces / "imgs/3/1.jpg")
    result = script(
        ROOT, "scripts/embed.py", "--resume", str(faces / "checkpoint.pth.tar"), single, str(tmp_path / "more"),
        str(faces / "imgs/0"), "--output", str(tmp_path / "embeddings.npy"), "--device", "cpu", "-b", "4", "-j", "2",
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    embeddings = np.load(tmp_path / "embeddings.npy")
    assert embeddings.dtype == np.float32 and embeddings.shape == (6, 512)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    paths = (tmp_path / "embeddings.txt").read_text().splitlines()
    assert paths == [single, str(tmp_path / "more/a.png"), str(tmp_path / "more/deep/b.png"),
                     *(str(faces / f"imgs/0/{i}.jpg") for i in range(3))]

    result = script(
        ROOT, "scripts/embed.py", paths[0], paths[3], "--resume", str(faces / "checkpoint.pth.tar"), "--device", "cpu"
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    cosine, distance = re.fullmatch(
        r"cosine similarity: (-?\d\.\d{6})\nL2 distance squared: (\d\.\d{6})\n", result.stdout
    ).groups()
    assert float(cosine) == pytest.approx(embeddings[0] @ embeddings[3], abs=1e-5)
    assert float(distance) == pytest.approx(2 - 2 * float(cosine), abs=1e-5)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["{faces}/imgs/0"], "--output is missing"),
        (["{faces}/imgs/0/0.jpg"], "--output is missing"),
        (["{faces}/imgs/0", "--output", "{faces}/none/e.npy"], "there is no directory"),
        (["{faces}/imgs/0", "--output", "{faces}/e.txt"], "ends in .npy"),
        (["{faces}/none", "--output", "{faces}/e.npy"], "none: no such file or directory"),
        (["{empty}", "--output", "{faces}/e.npy"], "no images below it"),
        (["{faces}/imgs", "--output", "{faces}/e.npy", "--resume", ""], "--resume is missing"),
        (["{faces}/imgs", "--output", "{faces}/e.npy", "--resume", "none"], "--resume none: no such file"),
        (["{faces}/imgs", "--output", "{faces}/e.npy", "-a", "vgg"], "--arch vgg is unknown"),
        (["{faces}/imgs", "--output", "{faces}/e.npy", "-b", "0"], "--batch-size 0"),
        ([], "IMAGE_OR_DIR"),
    ],
)
def test_embed_script_mistakes(
    argv: list[str], message: str, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import embed

    monkeypatch.setattr(embed, "open_weights", lambda *_: pytest.fail("read the checkpoint"))
    parts = [part.format(faces=faces, empty=tmp_path) for part in argv]
    monkeypatch.setattr(sys, "argv", ["embed.py", "--resume", str(faces / "checkpoint.pth.tar"), *parts])
    with pytest.raises(UserError, match=message) as caught:
        embed.main()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Real faces: 1,000 pairs of LFW's first view, in the layout that valid.py reads


@pytest.mark.skipif(not os.environ.get("ARCFACE_REAL_FACES"), reason="ARCFACE_REAL_FACES names no folder of real faces")
def test_pixels_of_real_faces() -> None:
    """What pixels alone are worth, as computed by a separate literal program; single-label folds give 0.38 to 0.56."""
    root = Path(os.environ["ARCFACE_REAL_FACES"]) / "lfw"
    pairs = PairList(str(root / "imgs"), str(root / "pair.list"))
    assert len(pairs) == 1000
    images = PairImages(pairs)
    pixels = np.stack([images[i][0].numpy().reshape(-1) for i in range(len(images))]).astype(np.float32) / 127.5 - 1
    centred = pixels - pixels.mean(1, keepdims=True)
    for embeddings, accuracy in ((pixels, 0.588), (pixels + 1, 0.620), (centred, 0.623)):
        result = evaluate(embeddings[pairs.index1], embeddings[pairs.index2], pairs.is_same)
        assert result.accuracy == pytest.approx(accuracy, abs=0.003)
