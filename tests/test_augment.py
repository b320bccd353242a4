import hashlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import augment as module
from data.augment import AUGMENTS, MAX_SHIFT, STREAM_FLIP, STREAM_SHIFT_X, STREAM_SHIFT_Y, prepare_batch, random_uniform

MANY = torch.arange(100_000)


def random_images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def normalised(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (images.to(dtype) / 255 - 0.5) / 0.5


def drawn_shifts(seed: int, epoch: int, indices: torch.Tensor) -> list[tuple[int, int]]:
    """(dy, dx) of each image, from the definition: the uniform number cut into 13 equal parts."""
    shifts = [
        [int(u * (2 * MAX_SHIFT + 1)) - MAX_SHIFT for u in random_uniform(seed, epoch, indices, stream).tolist()]
        for stream in (STREAM_SHIFT_Y, STREAM_SHIFT_X)
    ]
    return list(zip(*shifts))


def slow_shift(image: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """Pad by repeating the border, then cut out a window: nothing in common with a gather."""
    padded = np.pad(image, ((0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT)), mode="edge")
    top, left = MAX_SHIFT - dy, MAX_SHIFT - dx
    return padded[:, top : top + 112, left : left + 112]


# random_uniform


def splitmix64_reference(z: int) -> int:
    mask = 2**64 - 1
    z = (z + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_splitmix64_reference_gives_the_published_sequence():
    # The first outputs of the published splitmix64.c for state 0, whose k-th output is h(k * 0x9E3779B97F4A7C15).
    outputs = [splitmix64_reference(k * 0x9E3779B97F4A7C15 & (2**64 - 1)) for k in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("seed, epoch, stream", [(0, 0, 0), (1, 0, 0), (7, 3, 2), (2**63 + 5, 100, 1)])
def test_random_uniform_is_its_formula(seed, epoch, stream):
    indices = [0, 1, 2, 1000, 5_800_000, 2**40]
    h = splitmix64_reference
    expected = [(h(h(h(h(seed) ^ epoch) ^ stream) ^ i) >> 11) * 2.0**-53 for i in indices]
    assert random_uniform(seed, epoch, torch.tensor(indices), stream).tolist() == expected


def test_random_uniform_never_changes():
    # Golden values: another number here breaks every resumed run.
    golden = [
        0.1296456182997474,
        0.16526896395580137,
        0.31059630345365596,
        0.41232273959211374,
        0.9036650485933474,
    ]
    drawn = random_uniform(0, 0, torch.arange(4), 0).tolist()
    drawn += random_uniform(42, 3, torch.tensor([123456]), 1).tolist()
    assert drawn == golden


def test_random_uniform_is_uniform():
    u = random_uniform(3, 1, MANY, STREAM_FLIP)
    assert u.dtype == torch.float64 and u.shape == MANY.shape
    assert 0 <= u.min() and u.max() < 1
    # Standard errors for 100,000 draws: mean 0.0009, variance 0.00024, each of 20 bins 69 of 5,000.
    assert abs(u.mean() - 1 / 2) < 0.004
    assert abs(u.var() - 1 / 12) < 0.001
    counts = torch.histc(u, bins=20, min=0, max=1)
    assert (counts - 5000).abs().max() < 350


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: random_uniform(3, 1, MANY, STREAM_SHIFT_X), id="stream"),
        pytest.param(lambda: random_uniform(3, 2, MANY, STREAM_FLIP), id="epoch"),
        pytest.param(lambda: random_uniform(4, 1, MANY, STREAM_FLIP), id="seed"),
        pytest.param(lambda: random_uniform(3, 1, MANY + 1, STREAM_FLIP), id="neighbour"),
        pytest.param(lambda: random_uniform(3, 1, MANY + 2**20, STREAM_FLIP), id="far index"),
        pytest.param(lambda: random_uniform(1, 3, MANY, STREAM_FLIP), id="seed and epoch swapped"),
    ],
)
def test_random_uniform_is_independent_of(other):
    u, v = random_uniform(3, 1, MANY, STREAM_FLIP), other()
    correlation = torch.corrcoef(torch.stack([u, v]))[0, 1]
    assert abs(correlation) < 0.015  # standard error 0.003
    both_small = ((u < 0.5) & (v < 0.5)).double().mean()
    assert abs(both_small - 0.25) < 0.007


def test_random_uniform_takes_each_index_by_itself():
    indices = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    whole = random_uniform(5, 9, torch.arange(1000), 1)
    assert torch.equal(random_uniform(5, 9, indices, 1), whole[indices])
    assert torch.equal(torch.cat([random_uniform(5, 9, part, 1) for part in indices.split(7)]), whole[indices])


# prepare_batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_shape_dtype_and_range(augment, dtype):
    images = random_images(8)  # of which "strong" leaves some as they are
    before = images.clone()
    batch = prepare_batch(images, dtype, augment=augment, seed=0, epoch=0, indices=torch.arange(8))
    assert batch.shape == (8, 3, 112, 112) and batch.dtype == dtype and batch.is_contiguous()
    assert batch.min() == -1 and batch.max() == 1
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_none_only_normalises(dtype):
    images = random_images(4)
    assert torch.equal(prepare_batch(images, dtype), normalised(images, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flip_is_torch_flip_where_the_number_is_small(dtype):
    images, indices = random_images(32), torch.arange(500, 532)
    batch = prepare_batch(images, dtype, augment="flip", seed=1, epoch=2, indices=indices)
    flipped = random_uniform(1, 2, indices, STREAM_FLIP) < 0.5
    assert 0 < flipped.sum() < 32
    assert torch.equal(batch[flipped], normalised(images[flipped].flip(3), dtype))
    assert torch.equal(batch[~flipped], normalised(images[~flipped], dtype))


def test_standard_is_flip_then_shift_image_by_image():
    images, indices = random_images(64), torch.arange(64) * 17
    batch = prepare_batch(images, torch.float64, augment="standard", seed=1, epoch=2, indices=indices)
    flips = (random_uniform(1, 2, indices, STREAM_FLIP) < 0.5).tolist()
    shifts = drawn_shifts(1, 2, indices)
    for row in range(64):
        image = images[row].flip(2) if flips[row] else images[row]
        expected = torch.from_numpy(slow_shift(image.numpy(), *shifts[row]))
        assert torch.equal(batch[row], normalised(expected, torch.float64)), (row, flips[row], shifts[row])
    assert all({-MAX_SHIFT, MAX_SHIFT} <= set(axis) for axis in zip(*shifts))  # both borders were tried on each axis


def test_half_of_the_images_are_flipped_and_shifts_are_uniform():
    flips = random_uniform(0, 0, MANY, STREAM_FLIP) < 0.5
    assert abs(flips.double().mean() - 0.5) < 0.007  # standard error 0.0016
    shifts = torch.tensor(drawn_shifts(0, 0, MANY))
    for direction in (0, 1):
        values, counts = shifts[:, direction].unique(return_counts=True)
        assert values.tolist() == list(range(-6, 7))
        assert (counts - len(MANY) / 13).abs().max() < 420  # standard error 84


def test_flips_seen_in_the_pixels_have_probability_one_half():
    # A dark left half and a bright right half: the first column tells whether the image was mirrored.
    images = torch.zeros(1, 3, 112, 112, dtype=torch.uint8).expand(2000, -1, -1, -1).clone()
    images[..., 56:] = 255
    for augment in ("flip", "standard"):
        batch = prepare_batch(images, torch.float32, augment=augment, seed=6, epoch=0, indices=torch.arange(2000))
        flipped = batch[:, 0, 0, 0] == 1
        assert abs(flipped.double().mean() - 0.5) < 0.05  # standard error 0.011


@pytest.mark.parametrize("augment", ["flip", "standard", "strong"])
def test_what_an_image_gets_does_not_depend_on_its_batch(augment):
    images, indices = random_images(120), torch.arange(100, 220)
    options = dict(augment=augment, seed=8, epoch=4)
    whole = prepare_batch(images, torch.float32, indices=indices, **options)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    for size in (1, 7, 50):
        parts = [
            prepare_batch(images[rows], torch.float32, indices=indices[rows], **options) for rows in order.split(size)
        ]
        assert torch.equal(torch.cat(parts), whole[order])


@pytest.mark.parametrize("augment", AUGMENTS)
def test_strides_and_threads_do_not_matter(augment):
    images, indices = random_images(40), torch.arange(40)
    options = dict(augment=augment, seed=8, epoch=4, indices=indices)
    expected = prepare_batch(images, torch.float32, **options)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        batch = prepare_batch(channels_last, torch.float32, **options)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(batch, expected) and batch.is_contiguous()


@pytest.mark.parametrize(
    "augment, expected",
    [
        ("none", "d323e83505f7b047"),
        ("flip", "5298d03d71bbb135"),
        ("standard", "b47f6f1571c37a18"),
        ("strong", "77b84ab21f47b7f3"),
    ],
)
def test_augmentations_never_change(augment, expected):
    # Golden values: other ones break every resumed run.
    images = torch.from_numpy((np.arange(64 * 3 * 112 * 112) * 2654435761 >> 7 & 255).astype(np.uint8)).view(
        64, 3, 112, 112
    )
    batch = prepare_batch(images, torch.float32, augment=augment, seed=1, epoch=2, indices=torch.arange(64))
    assert hashlib.sha256(batch.numpy().tobytes()).hexdigest()[:16] == expected


# strong: each part against the same from other functions, and what is drawn


def test_resampling_is_adaptive_pooling_then_interpolation():
    images = random_images(5)
    top, left, side, resolution = torch.tensor(
        [[0, 10, 27, 5, 0], [0, 0, 28, 20, 3], [112, 100, 84, 90, 109], [112, 37, 84, 16, 64]]
    )
    out = module._resample(images.float(), top, left, side, resolution)
    assert torch.equal(out[0], images[0].float())  # the whole window at full resolution is the image itself
    for i in range(5):
        window = images[i : i + 1, :, top[i] : top[i] + side[i], left[i] : left[i] + side[i]].double()
        cells = F.adaptive_avg_pool2d(window, int(resolution[i]))
        expected = F.interpolate(cells, size=112, mode="bilinear", align_corners=False)
        torch.testing.assert_close(out[i].double(), expected[0], rtol=0, atol=1e-3)


def test_blur_is_a_gaussian_convolution():
    images, sigmas = random_images(3), (0.5, 1.3, 2.0)
    weights = torch.tensor([module._gaussian(sigma) for sigma in sigmas])
    out = module._blur(images.float(), *weights.T)
    for image, sigma, blurred in zip(images, sigmas, out):
        line = np.exp(-np.arange(-4, 5) ** 2 / (2 * sigma**2))
        kernel = torch.from_numpy(np.outer(line, line) / line.sum() ** 2)
        padded = F.pad(image[:, None].double(), (4, 4, 4, 4), mode="replicate")
        torch.testing.assert_close(blurred[:, None].double(), F.conv2d(padded, kernel[None, None]), rtol=0, atol=1e-3)


def test_colours():
    images = random_images(4)
    brightness, contrast, saturation = torch.tensor([[1, 1.3, 0.6, 1], [1, 0.7, 1.4, 1], [1, 1.2, 0.6, 0]])
    out = module._change_colors(images.float(), brightness, contrast, saturation).double()
    for i in range(4):
        x = images[i].double()
        luma = (0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]).expand(3, -1, -1)
        expected = luma + (x - luma) * float(saturation[i])
        expected = 127.5 + (expected * float(brightness[i]) - 127.5) * float(contrast[i])
        torch.testing.assert_close(out[i], expected.clamp(0, 255), rtol=0, atol=1e-3)
    assert torch.equal(out[0], images[0].double())
    assert torch.equal(out[3, 0], out[3, 1]) and torch.equal(out[3, 0], out[3, 2])


def without(monkeypatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(module, f"{name}_PROBABILITY", 0.0)


PARTS = ("CROP", "LOW_RESOLUTION", "BLUR", "COLOR", "GRAY")


@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_strong_comes_as_often_as_it_should(monkeypatch, part):
    without(monkeypatch, *(name for name in PARTS if name != part))
    images, indices = random_images(1).expand(600, -1, -1, -1), torch.arange(600)
    options = dict(seed=3, epoch=1, indices=indices)
    strong = prepare_batch(images, torch.float32, augment="strong", **options)
    changed = (strong != prepare_batch(images, torch.float32, augment="standard", **options)).flatten(1).any(1)
    probability = getattr(module, f"{part}_PROBABILITY")
    assert abs(changed.double().mean() - probability) < 4 * math.sqrt(probability * (1 - probability) / 600)


def test_strong_without_its_parts_is_standard(monkeypatch):
    without(monkeypatch, *PARTS)
    images, indices = random_images(20), torch.arange(20)
    strong, standard = (
        prepare_batch(images, torch.float64, augment=augment, seed=3, epoch=1, indices=indices)
        for augment in ("strong", "standard")
    )
    assert torch.equal(strong, standard)


def test_strong_keeps_within_the_range_and_near_the_image():
    smooth = F.interpolate(random_images(8)[:, :, :7, :7].float(), size=112, mode="bilinear").byte()
    images = smooth.repeat(25, 1, 1, 1)
    indices = torch.arange(200)
    strong, standard = (
        prepare_batch(images, torch.float32, augment=augment, seed=0, epoch=0, indices=indices)
        for augment in ("strong", "standard")
    )
    assert -1 <= strong.min() and strong.max() <= 1
    assert (strong - standard).abs().mean(dim=(1, 2, 3)).max() < 0.6


def test_epochs_and_seeds_augment_differently():
    images, indices = random_images(32), torch.arange(32)
    batches = [
        prepare_batch(images, torch.float32, augment="standard", seed=seed, epoch=epoch, indices=indices)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert not torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("augment", AUGMENTS)
def test_the_device_does_not_matter(augment):
    images, indices = random_images(16), torch.arange(16)
    options = dict(augment=augment, seed=1, epoch=2, indices=indices)
    on_gpu = prepare_batch(images.cuda(), torch.float64, **options)
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), prepare_batch(images, torch.float64, **options), rtol=0, atol=1e-15)


def test_unknown_augment():
    with pytest.raises(ValueError, match="'mirror', not one of none, flip, standard, strong"):
        prepare_batch(random_images(1), torch.float32, augment="mirror", indices=torch.arange(1))
