import errno
import os
import pickle
import shutil
import signal
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import data.loader
from data import decode
from data.augment import prepare_batch
from data.decode import read_image
from data.folder import FaceFolder
from data.loader import DeviceBatches, GlobalBatchSampler, NoBatch, TrainBatch, build_train_loader, read_images
from utils.errors import UserError

# More workers than cores, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create .* worker processes in total")

REAL_FACES = os.environ.get("ARCFACE_REAL_FACES", "")


def sampler_of(num_samples=50, global_batch=12, micro_batches=1, rank=0, world_size=1, seed=0, at=(0, 0)):
    sampler = GlobalBatchSampler(num_samples, global_batch, micro_batches, rank, world_size, seed)
    sampler.set_position(*at)
    return sampler


def assembled(world_size: int, **options) -> list[list[int]]:
    """The micro-batches of all ranks put together, in rank order."""
    by_rank = [list(sampler_of(rank=rank, world_size=world_size, **options)) for rank in range(world_size)]
    return [sum(parts, []) for parts in zip(*by_rank, strict=True)]


class Pictures(Dataset):
    """Image i is noise drawn from i, its label is i % 7."""

    def __init__(self, length: int = 50) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image = torch.randint(0, 256, (3, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        return image, i % 7


class AboutTheProcess(Pictures):
    """The label tells about the process that reads it."""

    def __init__(self, question) -> None:
        super().__init__()
        self.question = question

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, 112, 112, dtype=torch.uint8), int(self.question())


def loader_of(dataset: Dataset, sampler: GlobalBatchSampler, workers: int = 0):
    return build_train_loader(dataset, sampler, workers=workers, pin_memory=False)


# The sampler


def test_an_epoch_takes_every_sample_at_most_once_and_drops_the_incomplete_batch():
    sampler = sampler_of(num_samples=50, global_batch=12)
    batches = list(sampler)
    assert sampler.steps_per_epoch == len(sampler) == len(batches) == 4
    assert all(len(batch) == 12 and all(type(i) is int for i in batch) for batch in batches)
    taken = sum(batches, [])
    assert len(set(taken)) == 48 and set(taken) <= set(range(50))
    whole = list(sampler_of(num_samples=48, global_batch=12))
    assert sorted(sum(whole, [])) == list(range(48))


def test_the_order_never_changes():
    # Golden values: another order here breaks every resumed run.
    order = list(sampler_of(num_samples=10, global_batch=5, seed=42, at=(3, 0)))
    assert order == [[4, 3, 7, 2, 5], [1, 9, 8, 0, 6]]


def test_order_depends_on_seed_and_epoch():
    orders = [sum(sampler_of(seed=seed, at=(epoch, 0)), []) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2))]
    assert len({tuple(order) for order in orders}) == 5
    assert sum(sampler_of(seed=1, at=(1, 0)), []) == orders[3]
    # Two permutations of 50 agree in one place on average.
    assert sum(a == b for a, b in zip(orders[0], orders[1])) < 8


def test_shuffling_is_fair():
    firsts = [next(iter(sampler_of(num_samples=10, global_batch=10, at=(epoch, 0))))[0] for epoch in range(2000)]
    assert np.abs(np.bincount(firsts, minlength=10) - 200).max() < 60  # standard error 13


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_global_and_micro_batches_are_the_same_at_every_world_size(world_size, micro_batches):
    options = dict(num_samples=200, global_batch=72, seed=3, at=(2, 0))
    micro = assembled(world_size, micro_batches=micro_batches, **options)
    assert micro == assembled(1, micro_batches=micro_batches, **options)
    steps = [sum(micro[k : k + micro_batches], []) for k in range(0, len(micro), micro_batches)]
    assert steps == list(sampler_of(**options))
    rank = sampler_of(rank=world_size - 1, world_size=world_size, micro_batches=micro_batches, **options)
    assert len(rank) == 2 * micro_batches and {len(part) for part in rank} == {72 // micro_batches // world_size}


@pytest.mark.parametrize("step", range(5))
def test_a_position_gives_the_tail_of_the_epoch(step):
    for options in ({}, dict(micro_batches=2, rank=1, world_size=3)):
        full = list(sampler_of(at=(5, 0), **options))
        sampler = sampler_of(at=(5, step), **options)
        tail = list(sampler)
        assert tail == full[step * options.get("micro_batches", 1) :]
        assert len(sampler) == len(tail)  # iterating did not move the position
        assert list(sampler) == tail


def test_settings_that_cannot_work():
    with pytest.raises(UserError, match="5 images are fewer than one global batch of 6; .*--batch-size"):
        GlobalBatchSampler(5, 6, 1, 0, 1, 0)
    with pytest.raises(UserError, match="global batch of 12 .*5 processes x 1 micro-batches"):
        GlobalBatchSampler(50, 12, 1, 0, 5, 0)
    with pytest.raises(UserError, match="--accumulation-steps"):
        GlobalBatchSampler(50, 12, 4, 0, 2, 0)
    assert GlobalBatchSampler(6, 6, 1, 0, 1, 0).steps_per_epoch == 1
    with pytest.raises(AssertionError):
        sampler_of(at=(0, 5))


def test_millions_of_samples_cost_little():
    samples = 5_800_000
    sampler = sampler_of(num_samples=samples, global_batch=512, rank=7, world_size=8)
    assert len(pickle.dumps(sampler)) < 1000
    started = time.perf_counter()
    order = iter(sampler)
    assert len(next(order)) == 64
    assert time.perf_counter() - started < 10  # about 0.3 s on a quiet core
    del order
    loader = loader_of(Pictures(samples), sampler)
    tracemalloc.start()
    for epoch in range(3):  # each left in the middle, as --max-steps does
        sampler.set_position(epoch, 0)
        next(iter(loader))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * 4 * samples  # one int32 permutation, not two


# The loader


def test_batches_hold_what_the_sampler_asks_for():
    dataset, sampler = Pictures(), sampler_of(micro_batches=2)
    loader = loader_of(dataset, sampler)
    assert len(loader) == 8
    batches = list(loader)
    assert len(batches) == 8
    for batch, wanted in zip(batches, sampler):
        images, labels, indices, skipped = batch
        assert isinstance(batch, TrainBatch) and skipped == 0
        assert images.shape == (6, 3, 112, 112) and images.dtype == torch.uint8
        assert labels.dtype == indices.dtype == torch.int64
        assert indices.tolist() == wanted and labels.tolist() == [i % 7 for i in wanted]
        assert all(torch.equal(image, dataset[i][0]) for image, i in zip(images, wanted))


def augmented_epoch(world_size: int, workers: int, micro_batches: int, at: tuple[int, int]) -> list[torch.Tensor]:
    """Global micro-batches as the backbone gets them, all ranks put together, with labels and indices behind."""
    by_rank = []
    for rank in range(world_size):
        sampler = sampler_of(rank=rank, world_size=world_size, micro_batches=micro_batches, seed=11, at=at)
        parts = []
        for images, labels, indices, _ in loader_of(Pictures(), sampler, workers):
            inputs = prepare_batch(images, torch.float32, augment="strong", seed=11, epoch=at[0], indices=indices)
            parts.append(torch.cat([inputs.flatten(1), labels[:, None], indices[:, None]], dim=1))
        by_rank.append(parts)
    return [torch.cat(parts) for parts in zip(*by_rank, strict=True)]


@pytest.fixture(scope="module")
def expected_epoch() -> list[torch.Tensor]:
    return augmented_epoch(world_size=1, workers=0, micro_batches=1, at=(1, 0))


@pytest.mark.parametrize(
    "world_size, workers, micro_batches",
    [(1, 0, 1), (1, 1, 1), (1, 2, 1), (1, 4, 1), (2, 0, 1), (2, 1, 1), (2, 2, 1), (2, 4, 1), (3, 0, 2), (4, 2, 1)],
)
def test_augmented_batches_do_not_depend_on_workers_and_world_size(expected_epoch, world_size, workers, micro_batches):
    epoch = augmented_epoch(world_size, workers, micro_batches, at=(1, 0))
    assert torch.equal(torch.cat(epoch), torch.cat(expected_epoch))


def test_a_resumed_epoch_is_the_tail_of_the_whole_one(expected_epoch):
    for workers, step in ((0, 1), (2, 3), (0, 4)):
        tail = augmented_epoch(1, workers, 1, at=(1, step))
        assert len(tail) == 4 - step
        assert all(torch.equal(a, b) for a, b in zip(tail, expected_epoch[step:], strict=True))


def test_another_epoch_is_another_one(expected_epoch):
    assert not torch.equal(torch.cat(augmented_epoch(1, 0, 1, at=(2, 0))), torch.cat(expected_epoch))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_position_may_change_between_epochs_and_in_the_middle_of_one(workers):
    sampler = sampler_of()
    loader = loader_of(Pictures(), sampler, workers)
    next(iter(loader))
    for position in ((1, 0), (2, 3), (0, 0)):
        sampler.set_position(*position)
        assert [batch.indices.tolist() for batch in loader] == list(sampler)


def test_workers_persist_take_one_thread_and_survive_signals():
    sampler = sampler_of()
    loader = loader_of(AboutTheProcess(os.getpid), sampler, workers=2)
    batches = iter(loader)
    pids = set(next(batches).labels.tolist())
    assert os.getpid() not in pids
    for pid in pids:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, number)
    for batch in batches:
        pids |= set(batch.labels.tolist())
    assert len(pids) == 2
    sampler.set_position(1, 0)
    assert set(torch.cat([batch.labels for batch in loader]).tolist()) == pids
    labels = torch.cat(
        [batch.labels for batch in loader_of(AboutTheProcess(torch.get_num_threads), sampler_of(), workers=1)]
    )
    assert (labels == 1).all()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_that_die_or_stand_still_are_replaced(capfd, monkeypatch, number):
    """Not a batch is lost or read twice, and the next epoch uses the new workers."""
    sampler = sampler_of(global_batch=4)
    loader = build_train_loader(AboutTheProcess(os.getpid), sampler, workers=2, pin_memory=False, patience=0.5)
    batches = iter(loader)
    read = [next(batches)]
    for worker in loader._iterator._workers:
        os.kill(worker.pid, number)
    read += batches
    assert [batch.indices.tolist() for batch in read] == list(sampler)
    assert ("SIGKILL" if number == signal.SIGKILL else "no batch for") in capfd.readouterr().err
    sampler.set_position(1, 0)
    assert [batch.indices.tolist() for batch in loader] == list(sampler)
    assert capfd.readouterr().err == ""
    os.kill(loader._iterator._workers[0].pid, number)  # between two epochs
    monkeypatch.setattr(data.loader, "STUCK_SECONDS_STOPPING", 0.5)
    assert [batch.indices.tolist() for batch in loader] == list(sampler)


def test_images_that_cannot_be_read_end_in_one_line(capfd, monkeypatch):
    monkeypatch.setattr(data.loader, "STUCK_SECONDS_STOPPING", 0.3)
    sleeping = AboutTheProcess(lambda: time.sleep(60))
    begun = time.monotonic()
    with pytest.raises(NoBatch, match="no batch for"):  # a stop signal shortens the wait
        next(iter(build_train_loader(sleeping, sampler_of(), workers=1, pin_memory=False, stopping=lambda: True)))
    with pytest.raises(NoBatch, match="no batch for"):
        next(read_images(sleeping, range(9), batch_size=3, workers=2, patience=0.3))
    with pytest.raises(NoBatch, match="status 3"):
        next(read_images(AboutTheProcess(lambda: os._exit(3)), range(9), batch_size=3, workers=2))
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_from_files_hold_the_pixels_of_decode_image(faces, workers, world_size):
    folder = FaceFolder(faces)
    expected = torch.stack([read_image(folder.path(i)) for i in range(len(folder))])
    for rank in range(world_size):
        sampler = sampler_of(num_samples=48, global_batch=8, rank=rank, world_size=world_size)
        loader = loader_of(folder, sampler, workers)
        next(iter(loader))  # left at once: what was read ahead must not be mixed into what follows
        for epoch in range(2):
            sampler.set_position(epoch, 0)
            batches = list(loader)  # all of them first: none may be overwritten by a later one
            for batch, wanted in zip(batches, sampler, strict=True):
                assert batch.indices.tolist() == wanted and batch.labels.tolist() == folder.labels[wanted].tolist()
                assert torch.equal(batch.images, expected[wanted])
                assert batch.images.permute(0, 2, 3, 1).is_contiguous()


def test_without_torchvisions_operator_pillow_gives_the_same(faces, monkeypatch):
    folder, sampler = FaceFolder(faces), sampler_of(num_samples=48, global_batch=8)
    assert decode.jpeg_operator() is not None
    expected = list(loader_of(folder, sampler))
    monkeypatch.setattr(decode, "jpeg_operator", lambda: None)
    for a, b in zip(loader_of(folder, sampler), expected, strict=True):
        assert torch.equal(a.images, b.images)


def test_batches_for_the_cpu_are_not_copied():
    batches = list(loader_of(Pictures(), sampler_of()))
    for moved, batch in zip(DeviceBatches(batches, torch.device("cpu")), batches, strict=True):
        assert isinstance(moved, TrainBatch) and moved.images is batch.images and moved.labels is batch.labels


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_an_evaluation_come_in_the_order_asked_for(faces, workers):
    folder = FaceFolder(faces)
    wanted = [*range(5, 31), 0, 0, 47]
    state = torch.get_rng_state()
    batches = list(read_images(folder, wanted, batch_size=12, workers=workers))
    assert torch.equal(torch.get_rng_state(), state)  # a training run may use it
    assert [len(batch) for batch in batches] == [12, 12, 5] and batches[0].dtype == torch.uint8
    assert torch.equal(torch.cat(batches), torch.stack([folder[i][0] for i in wanted]))
    images = torch.cat(list(read_images(Pictures(), [3, 1, 2], batch_size=2, workers=workers)))
    assert torch.equal(images, torch.stack([Pictures()[i][0] for i in (3, 1, 2)]))
    assert list(read_images(folder, [], batch_size=2, workers=workers)) == []


# Bad images


def test_damaged_data_that_can_be_decoded_is_told_once_by_name(faces, tmp_path, capfd):
    folder = FaceFolder(shutil.copytree(faces / "train", tmp_path / "train"))
    path = Path(folder.path(3))
    whole, expected = path.read_bytes(), read_image(path)
    path.write_bytes(whole[:-2] + bytes(10) + whole[-2:])
    sampler = sampler_of(num_samples=48, global_batch=8)
    loader = loader_of(folder, sampler, workers=1)
    for epoch in range(2):
        sampler.set_position(epoch, 0)
        for batch in loader:
            for image in batch.images[batch.indices == 3]:
                assert torch.equal(image, expected)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"warning: {path}: the image's data is damaged (Corrupt JPEG data: ")


def make_faces(root: Path, images: int) -> FaceFolder:
    """Two identities; image i is of one gray level, 4·i."""
    for i in range(images):
        directory = root / ("a" if i < images // 2 else "b")
        directory.mkdir(exist_ok=True)
        Image.new("RGB", (112, 112), (4 * i,) * 3).save(directory / f"{i:02d}.png")
    return FaceFolder(root)


def truncate(path: str) -> None:
    with open(path, "r+b") as file:
        file.truncate(60)


def error_of(loader) -> Exception | None:
    """What iterating raises. (`with pytest.raises(...) as caught` would keep the loader's workers alive: a cycle.)"""
    try:
        list(loader)
    except Exception as error:
        return error.with_traceback(None)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_bad_image_arrives_as_one_clean_line(tmp_path, workers):
    faces = make_faces(tmp_path, 12)
    truncate(faces.path(5))
    assert faces.check_headers(skip_bad=False, progress=False) == 0
    error = error_of(loader_of(faces, sampler_of(num_samples=12, global_batch=4), workers))
    message = str(error)
    assert type(error) is UserError and "\n" not in message and "worker" not in message
    assert message.startswith(f"{faces.path(5)}: the image is damaged or truncated")
    assert message.endswith("(--skip-bad-images trains without such files)")


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_replaced_by_the_next_readable_ones(tmp_path, workers):
    faces = make_faces(tmp_path, 12)
    bad = {5: 7, 6: 7, 11: 0}  # the last one is replaced by the first
    for i in bad:
        truncate(faces.path(i))
    faces.skip_bad = True
    sampler = sampler_of(num_samples=12, global_batch=4)
    total = 0
    for batch, wanted in zip(loader_of(faces, sampler, workers), sampler, strict=True):
        taken = [bad.get(i, i) for i in wanted]
        assert batch.indices.tolist() == taken
        assert batch.images[:, 0, 50, 50].tolist() == [4 * i for i in taken]
        assert batch.labels.tolist() == [int(i >= 6) for i in taken]
        assert batch.skipped == sum(i in bad for i in wanted)
        total += batch.skipped
    assert total == 3


def test_skipping_gives_up_when_nothing_is_readable(tmp_path, monkeypatch):
    faces = make_faces(tmp_path, 8)
    for i in range(8):
        truncate(faces.path(i))
    faces.skip_bad = True
    with pytest.raises(UserError, match="8 bad images in a row, the last one: .*png: the image is damaged"):
        list(loader_of(faces, sampler_of(num_samples=8, global_batch=4)))
    monkeypatch.setattr("data.loader._MAX_BAD_IN_A_ROW", 3)
    with pytest.raises(UserError, match="3 bad images in a row"):
        list(loader_of(faces, sampler_of(num_samples=8, global_batch=4)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_is_named(tmp_path, workers):
    faces = make_faces(tmp_path, 8)
    os.remove(faces.path(3))
    with pytest.raises(UserError, match="03.png: cannot be read .No such file or directory"):
        list(loader_of(faces, sampler_of(num_samples=8, global_batch=4), workers))


# Real faces, a GPU


@pytest.mark.skipif(not REAL_FACES, reason="ARCFACE_REAL_FACES names no folder of aligned faces")
def test_real_faces_load_the_same_with_any_number_of_workers():
    faces = FaceFolder(REAL_FACES)
    epochs = []
    for workers in (0, 2):
        sampler = sampler_of(num_samples=len(faces), global_batch=64)
        sampler.set_position(0, max(sampler.steps_per_epoch - 16, 0))
        started = time.perf_counter()
        epochs.append(list(loader_of(faces, sampler, workers)))
        images = sum(len(batch.images) for batch in epochs[-1])
        print(f"\n{workers} workers: {images / (time.perf_counter() - started):,.0f} images/s, their start included")
    for a, b in zip(*epochs, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.indices, b.indices)
        assert np.array_equal(a.labels, faces.labels[a.indices])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_for_a_gpu_hold_the_same():
    device, sampler = torch.device("cuda", 0), sampler_of()
    expected = list(loader_of(Pictures(), sampler))
    loader = build_train_loader(Pictures(), sampler, workers=2, pin_memory=True)
    for _ in range(3):
        for moved, batch in zip(DeviceBatches(loader, device), expected, strict=True):
            assert moved.images.is_cuda and moved.labels.is_cuda
            torch.ones(2000, 2000, device=device).matmul(torch.ones(2000, 2000, device=device))  # work to overlap with
            assert torch.equal(moved.images.cpu(), batch.images) and torch.equal(moved.labels.cpu(), batch.labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_pinned(workers):
    loader = build_train_loader(Pictures(), sampler_of(), workers=workers, pin_memory=True)
    for batch in loader:
        assert isinstance(batch, TrainBatch) and batch.images.is_pinned() and batch.skipped == 0


def test_a_limit_on_threads_is_one_line(monkeypatch):
    started = []

    def refuse(*arguments: object) -> None:
        started.append(arguments)
        vars(arguments[0])["_shutdown"] = True  # nothing to end when it is deleted
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter.__init__", refuse)
    with pytest.raises(UserError, match="--workers: 1 .*can't start new thread.*-j 0"):
        next(read_images(range(4), [0, 1], batch_size=1, workers=1))
    assert len(started) == 1


def test_without_room_for_semaphores_the_loader_says_what_to_do(monkeypatch):
    """As with a /dev/shm of 4 KiB."""
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.synchronize._multiprocessing.SemLock", full)
    with pytest.raises(UserError, match="--workers 1: .*No space left on device.*/dev/shm"):
        next(read_images(range(4), [0, 1], batch_size=1, workers=1))
