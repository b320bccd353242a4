"""embed_images, and scripts/embed.py."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import run
from helpers.evaluation import ALONE, CPU, Colours, Pixels, write_pairs
from helpers.images import make_folder
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from scripts import embed
from utils.dist.context import DistContext
from utils.errors import UserError
from utils.evaluation.embed import buffers_of_rank_0, embed_images


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning")  # torch's, where there are more workers than cores
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("batch_size, workers", [(8, 0), (1, 12), (7, 3), (64, 2)])
def test_embed_images(flip: bool, batch_size: int, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    images, backbone = Colours(20), Pixels().train()
    backbone.frozen.eval()
    embeddings = embed_images(
        backbone, images, ALONE, batch_size=batch_size, workers=workers, flip=flip, progress=False
    )
    assert embeddings.dtype == np.float32 and embeddings.shape == (20, 6)
    np.testing.assert_allclose(embeddings, images.expected(flip), atol=1e-6)
    assert sum(backbone.batches) == 20 * (1 + flip) and max(backbone.batches) == min(batch_size, 20)
    assert backbone.training and not backbone.frozen.training  # each module has its own mode again
    assert capsys.readouterr() == ("", "")


def test_embed_images_in_the_backbones_precision() -> None:
    images = Colours(5)
    embeddings = embed_images(Pixels().double(), images, ALONE, batch_size=2, workers=0, progress=False)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, images.expected(False), atol=1e-7)


def test_progress_is_a_line_each_print_freq_batches(capsys: pytest.CaptureFixture[str]) -> None:
    embed_images(Pixels(), Colours(20), ALONE, batch_size=3, workers=0, print_freq=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" images,")[0] for line in lines] == [f"embedded {done}/20" for done in (6, 12, 18, 20)]
    assert all(line.endswith(" images/s") for line in lines)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_raises_its_own_error(workers: int) -> None:
    backbone = Pixels().train()
    with pytest.raises(UserError) as caught:
        embed_images(backbone, Colours(20, broken=True), ALONE, batch_size=4, workers=workers, progress=False)
    assert str(caught.value) == "13.jpg: the file is empty"
    assert backbone.training


def test_unusable_embeddings_become_zero_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    images, backbone = Colours(20), Pixels()
    factor = torch.ones(20)
    factor[2], factor[5], factor[7], factor[9], factor[11] = float("nan"), float("inf"), 0, 1e-30, 1e30

    def spoil(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output * factor[:, None]

    backbone.register_forward_hook(spoil)
    embeddings = embed_images(backbone, images, ALONE, batch_size=20, workers=0, progress=False)
    usable = np.isin(np.arange(20), (2, 5, 7), invert=True)
    np.testing.assert_allclose(embeddings, images.expected(False) * usable[:, None], atol=1e-6)
    assert "3 of 20 embeddings are unusable (2 NaN or infinite, 1 zero)" in capsys.readouterr().err


def embed_together(rank: int, world_size: int, count: int, factors: list[float]) -> tuple[np.ndarray, str]:
    context = DistContext(rank, world_size, world_size, CPU)
    backbone = Pixels()
    backbone.register_forward_hook(lambda module, args, output: output * factor_of(args[0], factors))
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        rows = embed_images(backbone, Colours(count), context, batch_size=3, workers=0, progress=False)
    return rows, errors.getvalue()


def factor_of(images: torch.Tensor, factors: list[float]) -> torch.Tensor:
    """(n, 1): the entries of `factors` for the images, which their first pixels identify."""
    first = (Colours(len(factors)).colours[:, :, 0] / 255 - 0.5) / 0.5
    number = (images[:, None, :, 0, 0] - torch.from_numpy(first).float()).abs().sum(2).argmin(1)
    return torch.tensor(factors)[number][:, None]


@pytest.mark.parametrize("world_size, count", [(2, 20), (3, 20), (3, 7), (3, 2), (2, 1)])
def test_ranks_share_the_images(pools, world_size: int, count: int) -> None:
    """All ranks get what one process computes. Padding repeats the last image; unusable ones count once."""
    factors = [1.0] * count
    factors[-1] = float("nan")
    if count > 5:
        factors[4] = 0.0
    everywhere = pools(world_size).run(embed_together, count, factors)
    usable = np.array(factors) == 1
    for embeddings, _ in everywhere:
        np.testing.assert_allclose(embeddings, Colours(count).expected(False) * usable[:, None], atol=1e-6)
    warning = (f"warning: {count - usable.sum()} of {count} embeddings are unusable "
               f"(1 NaN or infinite, {int(count > 5)} zero)")
    assert warning in everywhere[0][1] and not any(errors for _, errors in everywhere[1:])


class CopiesBetweenDevices(TorchDispatchMode):
    """The operators that copy between host and GPU or that read a number from the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool]] = []  # (where to, whether the host goes on at once)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found.append(("number", False))
        out = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[func is torch.ops.aten.copy_.default]
            if source.device != out.device:
                self.found.append((out.device.type, kwargs.get("non_blocking", len(args) > 2 and args[2])))
        return out


def test_the_host_waits_for_the_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When all embeddings are computed, however many batches there are."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a GPU
    with FakeTensorMode(), CopiesBetweenDevices() as copies:
        batches = [torch.empty(4, 112, 112, 3, dtype=torch.uint8).permute(0, 3, 1, 2) for _ in range(5)]
        monkeypatch.setattr("utils.evaluation.embed.read_images", lambda *_, **__: (batch for batch in batches))
        with torch.device("cuda"):
            backbone = nn.Sequential(nn.Conv2d(3, 2, 56, 56), nn.Flatten())
        monkeypatch.setattr(backbone, "to", lambda device: backbone)  # which fake parameters do not allow
        with pytest.raises(DataDependentOutputException):  # of fake tensors, where numbers are read at the end
            embed_images(backbone, Colours(20), DistContext(0, 1, 1, torch.device("cuda", 0)), batch_size=4, workers=0,
                         flip=True, progress=False)
    assert copies.found == [("cuda", True)] * 5 + [("cpu", False)] + [("number", False)] * (len(copies.found) - 6)


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


@pytest.mark.parametrize("handled", [False, True])
def test_loading_processes_ignore_the_signals_that_their_reader_handles(handled: bool) -> None:
    """SIGTERM by default ends them, because Python sends it to its children at exit and then waits for them."""

    class Signals(Colours):
        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is (signal.SIG_IGN if handled else signal.SIG_DFL)
            return super().__getitem__(i)

    before = signal.signal(signal.SIGTERM, (lambda *_: None) if handled else signal.SIG_DFL)
    try:
        embed_images(Pixels(), Signals(4), ALONE, batch_size=2, workers=1, progress=False)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_embedding_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    embed_images(Pixels(), Colours(4), ALONE, batch_size=2, workers=1, progress=False)
    assert (torch.get_rng_state() == state).all()


# ---------------------------------------------------------------------------------------------------------------------
# scripts/embed.py


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("faces"))


@pytest.mark.slow
def test_embed_script_writes_embeddings_and_paths(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "more" / "deep").mkdir(parents=True)
    for name in ("more/deep/b.png", "more/a.png", "more/.hidden.png"):
        Image.new("RGB", (112, 112), (len(name), 90, 0)).save(tmp_path / name)
    (tmp_path / "more/notes.txt").write_text("no image")
    single = str(faces / "imgs/3/1.jpg")
    model = ["--resume", str(faces / "checkpoint.pth.tar"), "--device", "cpu"]
    run("scripts/embed.py", *model, single, tmp_path / "more", faces / "imgs/0",
        "--output", tmp_path / "embeddings.npy", "-b", 4, "-j", 2)
    embeddings = np.load(tmp_path / "embeddings.npy")
    assert embeddings.dtype == np.float32 and embeddings.shape == (6, 512)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    paths = (tmp_path / "embeddings.txt").read_text().splitlines()
    assert paths == [single, str(tmp_path / "more/a.png"), str(tmp_path / "more/deep/b.png"),
                     *(str(faces / f"imgs/0/{i}.jpg") for i in range(3))]

    monkeypatch.setattr(sys, "argv", ["embed.py", paths[0], paths[3], *model])
    embed.main()
    similarity = re.fullmatch(r"cosine similarity: (-?\d\.\d{6})\nL2 distance squared: (\d\.\d{6})\n",
                              capsys.readouterr().out)
    assert similarity
    cosine, distance = map(float, similarity.groups())
    assert cosine == pytest.approx(embeddings[0] @ embeddings[3], abs=1e-5)
    assert distance == pytest.approx(2 - 2 * cosine, abs=1e-5)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["{faces}/imgs/0"], "--output is missing"),
        (["{faces}/imgs/0/0.jpg"], "--output is missing"),
        (["{faces}/imgs/0", "--output", "{faces}/none/e.npy"], "--output .*e.npy: there is no directory"),
        (["{faces}/imgs/0", "--output", "{faces}/e.txt"], "--output .*e.txt: .*.npy"),
        (["{faces}/none", "--output", "{faces}/e.npy"], "none: no such file or directory"),
        (["{empty}", "--output", "{faces}/e.npy"], "no images below it"),
        (["{faces}/imgs", "--output", "{faces}/e.npy", "--resume", ""], "--resume: is empty"),
        (["{faces}/imgs", "--output", "{faces}/e.npy", "--resume", "none"], "--resume none: no such file"),
        (["{faces}/imgs", "--output", "{faces}/old.npy"], "--output .*old.txt: exists; .*--force"),
        (["{faces}/imgs", "--output", "{faces}/e.npy", "-a", "vgg"], "--arch vgg"),
        (["{faces}/imgs", "--output", "{faces}/e.npy", "-b", "0"], "--batch-size 0"),
        (["{faces}/imgs", "--output", "{faces}/e.npy", "--device", "cuda"], "--device cuda: PyTorch sees no GPU"),
        ([], "IMAGE_OR_DIR"),
    ],
)
def test_embed_script_mistakes(
    argv: list[str], message: str, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "open_weights", lambda *_: pytest.fail("read the checkpoint"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parts = [part.format(faces=faces, empty=tmp_path) for part in argv]
    (faces / "old.txt").touch()
    monkeypatch.setattr(sys, "argv", ["embed.py", "--resume", str(faces / "checkpoint.pth.tar"), *parts])
    with pytest.raises(UserError, match=message) as caught:
        embed.main()
    assert "\n" not in str(caught.value)


def test_links_that_lead_back_are_followed_once(tmp_path):
    make_folder(tmp_path, {"a": 1, "b": 1})
    for k in range(9):  # 9^40 paths lead to the images
        (tmp_path / "a" / f"link{k}").symlink_to(tmp_path)
    found = embed.find_images([str(tmp_path)])
    assert [os.path.relpath(path, tmp_path) for path in found] == ["a/000.jpg", "b/000.jpg"]


def test_files_of_other_kinds_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/1.jpg", "a/b/2.tif", "a/3.heic", "a/notes.txt", ".hidden/4.heic"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert embed.find_images([str(tmp_path)]) == [f"{tmp_path}/a/1.jpg", f"{tmp_path}/a/b/2.tif"]
    assert capsys.readouterr().err == f"warning: {tmp_path}: not used: files of other kinds: 1 .heic\n"
