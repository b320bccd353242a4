#!/usr/bin/env python3
"""What an evaluation costs beside the embeddings: opening a set of one file, and the LFW protocol's arithmetic.

    python3 scripts/bench_verification.py --csv scripts/results/verification_cpu.csv

The arithmetic takes turns with the same protocol written out threshold by threshold, as the published scripts have it; both
must give the same numbers before they are timed. One process, one thread.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data.insightface_bin import PairBin  # noqa: E402
from scripts.measure import aligned, append_csv, check_csv, describe_machine, percentiles  # noqa: E402
from utils.errors import Parser, UserError, exit_on_user_error  # noqa: E402
from utils.evaluation.lfw import TARGET_FAR, evaluate  # noqa: E402

CPU = torch.device("cpu")
CSV_COLUMNS = ("date", "device", "torch", "pairs", "embedding_size", "image_bytes", "repeat", "what", "p20_s", "p50_s", "p80_s")
FOLDS = 10


def main() -> None:
    parser = Parser("bench_verification.py", "Seconds of opening a .bin, and of the evaluation's arithmetic.")
    parser.add_argument("--pairs", type=int, default=6000, metavar="P", help="a multiple of 20 (default: %(default)s)")
    parser.add_argument("--embedding-size", type=int, default=512, metavar="D", help="default: %(default)s")
    parser.add_argument("--image-bytes", type=int, default=6000, metavar="B",
                        help="of each of the 2·P images in the file, all different (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=7, metavar="K", help="how often each is timed (default: %(default)s)")
    parser.add_argument("--csv", metavar="FILE", help="append a row for each figure")
    options = parser.parse_args()
    for flag in ("pairs", "embedding_size", "image_bytes", "repeat"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(options, flag)}: give a number of at least 1")
    if options.pairs % (2 * FOLDS) or options.pairs < 4 * FOLDS:
        raise UserError(f"--pairs {options.pairs}: give a multiple of {2 * FOLDS}, at least {4 * FOLDS}")
    if options.csv is not None:
        check_csv(options.csv, CSV_COLUMNS)
    torch.set_num_threads(1)

    rng = np.random.default_rng(0)
    is_same = np.tile(np.repeat([True, False], options.pairs // FOLDS // 2), FOLDS)
    first, second = rng.standard_normal((2, options.pairs, options.embedding_size), dtype=np.float32)
    second[is_same] = 2 * second[is_same] + first[is_same]
    ours = evaluate(first, second, is_same)
    written_out = threshold_by_threshold(first, second, is_same)
    for name, value in written_out.items():
        assert abs(getattr(ours, name) - value) < 1e-9, f"{name}: {getattr(ours, name)} and {value}"

    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "set.bin")
        images = [rng.bytes(options.image_bytes) for _ in range(2 * options.pairs)]
        with open(path, "wb") as file:
            pickle.dump((images, is_same.tolist()), file, protocol=pickle.HIGHEST_PROTOCOL)
        works = {
            "arithmetic": lambda: evaluate(first, second, is_same),
            "arithmetic, threshold by threshold": lambda: threshold_by_threshold(first, second, is_same),
            "open the set": lambda: PairBin(path),
        }
        seconds = {what: [seconds_of(work) for _ in range(options.repeat)] for what, work in works.items()}
    spread = {what: percentiles(values) for what, values in seconds.items()}
    print(f"{options.pairs:,} pairs, embedding {options.embedding_size}, {2 * options.pairs:,} images of "
          f"{options.image_bytes:,} bytes")
    rows = [(what, *(f"{value:.4f} s" for value in values)) for what, values in spread.items()]
    print(aligned([("", "p20", "p50", "p80"), *rows]))
    if options.csv is not None:
        common = {**describe_machine(CPU), **vars(options)}
        append_csv(options.csv, CSV_COLUMNS, [
            {**{name: common[name] for name in CSV_COLUMNS if name in common}, "what": what,
             "p20_s": values[0], "p50_s": values[1], "p80_s": values[2]}
            for what, values in spread.items()
        ])


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def threshold_by_threshold(first: np.ndarray, second: np.ndarray, is_same: np.ndarray) -> dict[str, float]:
    """Accuracy and validation rate by counting all pairs anew for each fold and each threshold of the grids."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    first, second = (e / np.linalg.norm(e, axis=1, keepdims=True) for e in (first, second))
    distance = ((first - second) ** 2).sum(axis=1)
    thresholds, fine = np.arange(0, 4, 0.01), np.arange(0, 4, 0.001)
    accuracy, val = [], []
    for part in np.array_split(np.arange(len(is_same)), FOLDS):
        others = np.setdiff1d(np.arange(len(is_same)), part)
        best = thresholds[np.argmax([np.mean((distance[others] < t) == is_same[others]) for t in thresholds])]
        accuracy.append(np.mean((distance[part] < best) == is_same[part]))
        false_accepts = [np.count_nonzero((distance[others] < t) & ~is_same[others]) for t in fine]
        far = np.array(false_accepts) / np.count_nonzero(~is_same[others])
        t = np.interp(TARGET_FAR, far, fine) if far.max() >= TARGET_FAR else 0.0
        val.append(np.count_nonzero((distance[part] < t) & is_same[part]) / np.count_nonzero(is_same[part]))
    return {"accuracy": float(np.mean(accuracy)), "val": float(np.mean(val))}


if __name__ == "__main__":
    exit_on_user_error(main)
