#!/usr/bin/env python3
"""Draw a synthetic identity set: images to train on, and pairs of people who are not among them.

    python3 scripts/synthesize.py OUT --identities 100 --images 20 --pairs 600 --pair-identities 50 --seed 0

    OUT/train/<identity>/*.jpg
    OUT/lfw/imgs/<identity>/*.jpg
    OUT/lfw/pair.list
    OUT/synthetic.json                the settings; written last
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.synthetic import write_identity_set, write_pairs  # noqa: E402
from utils.errors import Parser, UserError, exit_on_user_error  # noqa: E402

SETTINGS_FILE = "synthetic.json"
DRAWING_VERSION = 1  # increase it when the drawings change, so that old sets are not mistaken for new ones


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("synthesize.py", "Draw a synthetic identity set.")
    parser.add_argument("out", metavar="OUT", help="directory to create; unchanged if it already holds this set")
    parser.add_argument("--identities", type=int, default=100, metavar="N",
                        help="people in the training set (default: %(default)s)")
    parser.add_argument("--images", type=int, default=20, metavar="N", help="per identity (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=600, metavar="N",
                        help="image pairs, half of them of one person (default: %(default)s)")
    parser.add_argument("--pair-identities", type=int, default=50, metavar="N",
                        help="people in the pairs, none of them in the training set (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="(default: %(default)s)")
    parser.add_argument("--force", action="store_true",
                        help="replace a set that this program drew with other settings; nothing else is ever removed")
    options = parser.parse_args(argv)
    for flag, value, least in (
        ("--identities", options.identities, 2), ("--images", options.images, 1), ("--pairs", options.pairs, 2),
        ("--pair-identities", options.pair_identities, 2), ("--seed", options.seed, 0),
    ):
        if value < least:
            raise UserError(f"{flag} {value}: give at least {least}")
    return options


def read_settings(out: Path) -> dict | None:
    """The settings of the set in `out`; None if this program did not draw it."""
    try:
        settings = json.loads((out / SETTINGS_FILE).read_text())
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and "drawing_version" in settings else None


def main() -> None:
    options = parse_options()
    out = Path(options.out).resolve()
    names = ("identities", "images", "pairs", "pair_identities", "seed")
    settings = {"drawing_version": DRAWING_VERSION} | {name: getattr(options, name) for name in names}
    found = read_settings(out)
    if found == settings:
        print(f"=> {options.out} already holds this set")
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"OUT {options.out}: is not a directory; give another one")
    if out.exists() and any(out.iterdir()):
        if found is None:
            raise UserError(f"OUT {options.out}: is not empty and not from this program; give another directory")
        if not options.force:
            raise UserError(f"OUT {options.out}: holds a set with other settings; give another directory, or --force")

    started = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    # Drawn beside OUT and then renamed, so that OUT is complete or missing.
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        partial.chmod(0o755)
        write_identity_set(partial / "train", options.identities, options.images, options.seed)
        write_pairs(partial / "lfw", options.pairs, options.pair_identities, options.images, options.seed,
                    first_identity=options.identities)
        drawn = sum(1 for _ in partial.rglob("*.jpg"))
        (partial / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        if found is not None:
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    seconds = time.perf_counter() - started
    print(f"=> {options.out}: {options.identities} identities of {options.images} images to train on, {options.pairs} "
          f"pairs of {options.pair_identities} others; {drawn} images in {seconds:.1f} s ({drawn / seconds:.0f}/s)")


if __name__ == "__main__":
    exit_on_user_error(main)
