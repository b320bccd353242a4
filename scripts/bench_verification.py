#!/usr/bin/env python3
"""The cost of an evaluation without its embeddings: opening a .bin, and the arithmetic of the LFW protocol.

    python3 scripts/bench_verification.py --csv scripts/results/verification_cpu.csv

The arithmetic takes turns with the same protocol computed threshold by threshold, as in the published scripts. Both
must give the same numbers before they are timed. One process, one thread.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from dataclasses import asdict, dataclass

# Python puts the script's own directory on sys.path instead of the repository's root.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

import numpy as np
import torch

from data.insightface_bin import PairBin  # noqa: E402
from scripts import measure  # noqa: E402
from utils.errors import exit_on_user_error  # noqa: E402
from utils.evaluation.lfw import TARGET_FAR, evaluate  # noqa: E402
from utils.flags import flag, parse_flags  # noqa: E402
from utils.memory import keep_freed_memory  # noqa: E402

CSV_COLUMNS = ("date", "device", "torch", "pairs", "embedding_size", "image_bytes", "repeat", "what",
               "p20_s", "p50_s", "p80_s")
FOLDS = 10


@dataclass(frozen=True)
class Options:
    """The flags of bench_verification.py."""

    pairs: int = flag("--pairs", default=6000, metavar="P", at_least=4 * FOLDS, help="number of pairs")
    embedding_size: int = flag("--embedding-size", default=512, metavar="D", at_least=1, help="numbers per embedding")
    image_bytes: int = flag("--image-bytes", default=6000, metavar="B", at_least=1,
                            help="size of each of the 2·P different images in the file")
    repeat: int = flag("--repeat", default=7, metavar="K", at_least=1, help="how often each is timed")
    csv: str | None = flag("--csv", metavar="FILE", help="append a row for each figure")


def main() -> None:
    options = parse_flags(Options, "bench_verification.py", "Seconds to open a .bin and to compute the LFW protocol.")
    measure.check_csv(options.csv, CSV_COLUMNS)
    keep_freed_memory()
    torch.set_num_threads(1)

    rng = np.random.default_rng(0)
    is_same = np.arange(options.pairs) % 2 == 0
    first, second = rng.standard_normal((2, options.pairs, options.embedding_size), dtype=np.float32)
    second[is_same] = 2 * second[is_same] + first[is_same]
    ours = evaluate(first, second, is_same)
    for name, value in threshold_by_threshold(first, second, is_same).items():
        assert abs(getattr(ours, name) - value) < 1e-9, f"{name}: {getattr(ours, name)} and {value}"

    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "set.bin")
        with open(path, "wb") as file:
            images = [rng.bytes(options.image_bytes) for _ in range(2 * options.pairs)]
            pickle.dump((images, is_same.tolist()), file, protocol=pickle.HIGHEST_PROTOCOL)
        seconds = measure.alternate({
            "arithmetic": lambda: measure.timed(lambda: evaluate(first, second, is_same)),
            "arithmetic, threshold by threshold":
                lambda: measure.timed(lambda: threshold_by_threshold(first, second, is_same)),
            "open the set": lambda: measure.timed(lambda: PairBin(path)),
        }, options.repeat)
    common = {**asdict(options), **measure.describe_machine()}
    measure.report([{**common, "what": what, **measure.spread(values, "_s")} for what, values in seconds.items()],
                   CSV_COLUMNS, "what", options.csv)


def threshold_by_threshold(first: np.ndarray, second: np.ndarray, is_same: np.ndarray) -> dict[str, float]:
    """Accuracy and validation rate by counting all pairs again for each fold and each threshold of the grids."""
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
