#!/usr/bin/env python3
"""Draw a synthetic identity set: images to train on, and pairs of people who are not among them.

    python3 scripts/synthesize.py OUT --identities 100 --images 20 --pairs 600 --pair-identities 50 --seed 0

    OUT/train/<identity>/*.jpg
    OUT/lfw/imgs/<identity>/*.jpg
    OUT/lfw/pair.list
    OUT/landmarks.txt                 only with --unaligned: `train/<identity>/<image>.jpg x1 y1 ... x5 y5`
    OUT/synthetic.json                the settings; written last

With --unaligned the images are photos in which the faces are turned, of different sizes and anywhere:

    python3 scripts/align.py OUT ALIGNED --landmarks OUT/landmarks.txt
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages(["numpy", "PIL"])

import numpy as np

from scripts.synthetic import draw_face, draw_photo  # noqa: E402
from utils.errors import UserError, exit_on_user_error  # noqa: E402
from utils.flags import flag, parse_flags  # noqa: E402

SETTINGS_FILE = "synthetic.json"
DRAWING_VERSION = 2  # increase it when the drawings change, so that old sets are not mistaken for new ones


@dataclass(frozen=True)
class Options:
    """The arguments of synthesize.py."""

    out: str = flag("out", default="", metavar="OUT",
                    help="directory to create; unchanged if it already holds this set")
    identities: int = flag("--identities", default=100, metavar="N", at_least=2, help="people in the training set")
    images: int = flag("--images", default=20, metavar="N", at_least=1, help="images of each identity")
    pairs: int = flag("--pairs", default=600, metavar="N", at_least=2, help="image pairs, half of them of one person")
    pair_identities: int = flag("--pair-identities", default=50, metavar="N", at_least=2,
                                help="people in the pairs, none of them in the training set")
    unaligned: bool = flag("--unaligned", default=False, help="draw photos to align, and write their landmarks.txt")
    seed: int = flag("--seed", default=0, metavar="S", at_least=0, help="another seed draws other people")
    force: bool = flag("--force", default=False,
                       help="replace a set that this program drew with other settings; nothing else is ever removed")


def write_identity_set(
    directory: Path, identities: Iterable[int], images: int, seed: int = 0, landmarks: TextIO | None = None
) -> None:
    """Write `directory/<identity>/<image>.jpg`: so many `images` of each identity.

    landmarks: draw unaligned photos, and write there lines of `<path> x1 y1 ... x5 y5`, relative to the file.
    """
    some = [(identity, image) for identity in identities for image in range(images)]
    _write_images(directory, some, seed, landmarks)


def write_pairs(
    directory: Path, count: int, identities: range, images: int, seed: int = 0, landmarks: TextIO | None = None
) -> None:
    """Write `directory/pair.list` (lines `path1 path2 0|1`, 1: the same person) and the images it names below `imgs/`.

    landmarks: see write_identity_set. Raises UserError as `sample_pairs` does.
    """
    pairs = sample_pairs(count, identities, images, seed)
    _write_images(directory / "imgs", sorted({image for pair in pairs for image in pair}), seed, landmarks)
    lines = [f"{_name(*one)} {_name(*other)} {same:d}\n" for (one, other), same in pairs.items()]
    (directory / "pair.list").write_text("".join(lines))


def sample_pairs(
    count: int, identities: range, images: int, seed: int = 0
) -> dict[tuple[tuple[int, int], tuple[int, int]], bool]:
    """{((identity, image), (identity, image)): whether they are the same person}, alternately True and False.

    Raises UserError if there are not that many pairs.
    """
    most_same = len(identities) * (images * (images - 1) // 2)
    most_different = len(identities) * (len(identities) - 1) // 2 * images**2
    if (count + 1) // 2 > most_same or count // 2 > most_different:
        raise UserError(f"--pairs {count}: {len(identities)} identities of {images} images have only {most_same} pairs "
                        f"of one person and {most_different} of two; give fewer pairs, or more identities or images")
    rng = np.random.default_rng((seed, 2))
    pairs: dict[tuple[tuple[int, int], tuple[int, int]], bool] = {}
    while len(pairs) < count:
        same = len(pairs) % 2 == 0
        person, other_person = rng.choice(identities, 2, replace=False).tolist()
        one, other = rng.integers(images, size=2).tolist()
        pair = (person, one), (person if same else other_person, other)
        if pair[0] != pair[1]:
            pairs[min(pair), max(pair)] = same
    return pairs


def _write_images(directory: Path, images: list[tuple[int, int]], seed: int, landmarks: TextIO | None) -> None:
    write = functools.partial(_write_image, directory, seed, landmarks is not None)
    if len(images) < 200:  # drawn before other processes have started
        points = list(map(write, images))
    else:
        with ProcessPoolExecutor() as pool:
            points = list(pool.map(write, images, chunksize=50))
    if landmarks is not None:
        folder = directory.relative_to(Path(landmarks.name).parent)
        landmarks.writelines(f"{folder / _name(*image)} {text}\n" for image, text in zip(images, points))


def _write_image(directory: Path, seed: int, unaligned: bool, image: tuple[int, int]) -> str:
    """Returns the landmarks of an unaligned photo as text."""
    path = directory / _name(*image)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not unaligned:
        draw_face(*image, seed).save(path, quality=95)
        return ""
    photo, landmarks = draw_photo(*image, seed)
    photo.save(path, quality=95)
    return " ".join(f"{value:.2f}" for value in landmarks.ravel())


def _name(identity: int, image: int) -> str:
    return f"{identity:06d}/{image:03d}.jpg"


def read_settings(out: Path) -> dict | None:
    """The settings of the set in `out`; None if this program did not draw it."""
    try:
        settings = json.loads((out / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and "drawing_version" in settings else None


def main() -> None:
    options = parse_flags(Options, "synthesize.py", "Draw a synthetic identity set.")
    if not options.out:
        raise UserError("OUT is missing: give the directory to create")
    out = Path(options.out).resolve()
    settings = {"drawing_version": DRAWING_VERSION, **asdict(options)}
    for name in ("out", "force", *(["unaligned"] if not options.unaligned else [])):  # sets before this flag lack it
        del settings[name]
    found = read_settings(out)
    if found == settings:
        print(f"=> {options.out} already holds this set")
        return
    if found is None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"OUT {options.out}: is not empty and not from this program; give another directory")
    if found is not None and not options.force:
        raise UserError(f"OUT {options.out}: holds a set with other settings; give another directory, or --force")
    ours = ("train", "lfw", "landmarks.txt", SETTINGS_FILE)
    if others := [path.name for path in (out.iterdir() if found is not None else ())
                  if path.name not in ours and not path.name.startswith(".")]:
        raise UserError(f"OUT {options.out}: holds {others[0]} beside the set; move it, or give another directory")

    started = time.perf_counter()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Drawn beside OUT and then renamed, so that OUT is complete or missing.
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"OUT {out}: cannot be created ({error.strerror}); give another directory") from None
    try:
        partial.chmod(0o755)
        people = range(options.identities, options.identities + options.pair_identities)
        with contextlib.ExitStack() as stack:
            landmarks = stack.enter_context(open(partial / "landmarks.txt", "w")) if options.unaligned else None
            write_identity_set(partial / "train", range(options.identities), options.images, options.seed, landmarks)
            write_pairs(partial / "lfw", options.pairs, people, options.images, options.seed, landmarks)
        (partial / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        if found is not None:
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"=> {options.out}: {options.identities} identities of {options.images} images to train on, {options.pairs} "
          f"pairs of {options.pair_identities} others, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    exit_on_user_error(main)
