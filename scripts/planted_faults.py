#!/usr/bin/env python3
"""Plant known faults in a set of synthesize.py, and compare what audit.py finds with them.

    python3 scripts/planted_faults.py plant SET OUT
    python3 scripts/planted_faults.py score OUT AUDIT

    OUT/train, OUT/lfw     the set with its faults; identities have numbers without a meaning
    OUT/truth.json         what was planted

The faults: identities split into two; 5 % of the images in another identity's directory; people of the test pairs among
the training identities, one of their images being one of the test's; images that are there twice, as the same file and
re-encoded. What audit.py should find is exact in truth.json; score prints precision and recall of each category.
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages(["numpy", "PIL"])

from PIL import Image, ImageEnhance  # noqa: E402

from scripts.synthetic import draw_face  # noqa: E402
from utils.errors import Parser, UserError, exit_on_user_error  # noqa: E402

TRUTH_FILE = "truth.json"
CATEGORIES = ("duplicates", "noise", "overlap_identities", "overlap_images", "copies")


def plant(
    source: Path, out: Path, *, split: int = 10, wrong: float = 0.05, overlaps: int = 5, copies: int = 10,
    seed: int = 0, draw: Callable[[int, int, int], Image.Image] = draw_face,
) -> dict[str, list]:
    """Copy the set `source` to `out` with faults, and return the truth: {category: findings that are right}.

    split: identities whose images lie in two directories. wrong: part of the images that change their identity.
    overlaps: people of the test pairs that are training identities too. copies: images that are there twice as the same
    file; as many are there re-encoded. draw: (person, image, seed) -> another image. Raises UserError if `source` is
    too small for that.
    """
    rng, drawn = random.Random(seed), int(json.loads((source / "synthetic.json").read_text())["seed"])
    people, tested = (sorted(path.name for path in directory.iterdir() if path.is_dir())
                      for directory in (source / "train", source / "lfw" / "imgs"))
    if len(people) < 2 * split or len(tested) < overlaps:
        raise UserError(f"{source}: has {len(people)} identities and {len(tested)} in its pairs; {2 * split} and "
                        f"{overlaps} are needed")
    shutil.copytree(source / "lfw", out / "lfw")
    folders: dict[str, list[Path]] = {name: sorted((source / "train" / name).iterdir()) for name in people}
    truth: dict[str, list] = {category: [] for category in CATEGORIES}
    names = [f"p{number:05d}" for number in range(len(people) + split + overlaps)]
    rng.shuffle(names)  # neighbours in the list of names are not the same person
    parts = {names.pop(): folders[person] for person in people}
    for name in rng.sample(sorted(parts), split):
        half, other = len(parts[name]) // 2, names.pop()
        parts[name], parts[other] = parts[name][:half], parts[name][half:]
        truth["duplicates"].append(sorted((name, other)))
    placed = [(name, path) for name, files in sorted(parts.items()) for path in files]
    same = {name: set(pair) for pair in truth["duplicates"] for name in pair}
    moved = set(rng.sample(range(len(placed)), round(wrong * len(placed))))
    numbers = {name: 0 for name in parts}
    written: dict[str, list[str]] = {name: [] for name in parts}

    def place(name: str, path: Path) -> str:
        numbers[name] += 1
        image = f"{name}/{numbers[name]:03d}.jpg"
        (out / "train" / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / "train" / image)
        return image

    for number, (name, path) in enumerate(placed):
        if number in moved:
            other = rng.choice([other for other in sorted(parts) if other not in same.get(name, {name})])
            truth["noise"].append(place(other, path))
        else:
            written[name].append(place(name, path))
    for person in rng.sample(tested, overlaps):
        name = names.pop()
        (out / "train" / name).mkdir(parents=True)
        for number in range(12):  # others than those of the pairs, which come first
            draw(int(person), 1000 + number, drawn).save(out / "train" / name / f"{number:03d}.jpg", quality=95)
        shared = rng.choice(sorted((out / "lfw" / "imgs" / person).iterdir()))
        shutil.copyfile(shared, out / "train" / name / "100.jpg")
        truth["overlap_identities"].append(name)
        truth["overlap_images"].append([f"{name}/100.jpg", f"{person}/{shared.name}"])
    for number, name in enumerate(rng.sample(sorted(written), 2 * copies)):
        image = rng.choice(written[name])
        copy = out / "train" / name / f"{500 + number}.jpg"
        if number < copies:
            shutil.copyfile(out / "train" / image, copy)
        else:
            with Image.open(out / "train" / image) as picture:
                ImageEnhance.Brightness(picture.convert("RGB")).enhance(1.06).save(copy, quality=70)
        truth["copies"].append(sorted((image, f"{name}/{copy.name}")))
    (out / TRUTH_FILE).write_text(json.dumps(truth, indent=1) + "\n")
    return truth


def score(truth: dict[str, list], audit: str) -> dict[str, tuple[int, int, int]]:
    """{category: (right findings, findings, planted faults)} of an output of audit.py."""
    def rows(name: str) -> list[dict[str, str]]:
        with open(os.path.join(audit, name), newline="", encoding="utf-8", errors="surrogateescape") as file:
            return list(csv.DictReader(file))

    noise = [row for row in rows("noise.csv") if row["kind"] == "wrong label"]
    overlap = rows("overlap.csv")
    found: dict[str, Iterable] = {
        "duplicates": [tuple(sorted((row["identity"], row["other"]))) for row in rows("duplicates.csv")],
        "noise": [row["image"] for row in noise],
        "overlap_identities": [row["identity"] for row in overlap if row["kind"] == "identity"],
        "overlap_images": [(row["image"], "/".join(row["test image"].split("/")[-2:])) for row in overlap
                           if row["kind"] != "identity"],
        "copies": [tuple(sorted((row["image"], row["other"]))) for row in rows("copies.csv")],
    }
    result = {}
    for category in CATEGORIES:
        planted = {tuple(fault) if isinstance(fault, list) else fault for fault in truth[category]}
        distinct = set(found[category])
        result[category] = len(distinct & planted), len(distinct), len(planted)
    return result


def main() -> None:
    parser = Parser("planted_faults.py", "Plant known faults in a synthetic set, and score what audit.py finds.")
    parser.add_argument("command", choices=("plant", "score"))
    parser.add_argument("first", metavar="SET|OUT", help="plant: a set of synthesize.py; score: what plant wrote")
    parser.add_argument("second", metavar="OUT|AUDIT", help="plant: directory to create; score: --output of audit.py")
    given = parser.parse_args()
    try:
        if given.command == "plant":
            if os.path.exists(given.second):
                raise UserError(f"OUT {given.second}: exists; give another directory")
            truth = plant(Path(given.first), Path(given.second))
            print(f"=> {given.second}: " + ", ".join(f"{len(faults)} {name}" for name, faults in truth.items()))
            return
        truth = json.loads(Path(given.first, TRUTH_FILE).read_text())
        print(f"{'category':<20}{'planted':>9}{'found':>7}{'right':>7}{'precision':>11}{'recall':>8}")
        for category, (right, found, planted) in score(truth, given.second).items():
            precision = f"{right / found:.0%}" if found else "-"
            recall = f"{right / planted:.0%}" if planted else "-"
            print(f"{category:<20}{planted:>9}{found:>7}{right:>7}{precision:>11}{recall:>8}")
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{given.first}, {given.second}: cannot be read ({error})") from None


if __name__ == "__main__":
    exit_on_user_error(main)
