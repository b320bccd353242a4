#!/usr/bin/env python3
"""The cost of IJB-C without its embeddings: opening the official files, fusing templates, 1:1 and 1:N.

    python3 scripts/bench_ijb.py --csv scripts/results/ijb_cpu.csv

Makes files in the official layout and of the official size, with random embeddings around a center per subject, in a
temporary directory (2 GB and an empty file per image). Similarities of random pairs, and the ranks of random probes,
must be those of plain loops. Then each part is timed; `peak_mib` is the largest resident set of the process.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# Python puts the script's own directory on sys.path instead of the repository's root.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

import numpy as np

from data.align import TEMPLATE  # noqa: E402
from scripts import measure  # noqa: E402
from utils.errors import exit_on_user_error  # noqa: E402
from utils.evaluation.embedding_file import EmbeddingFile  # noqa: E402
from utils.evaluation.identification import fuse_templates, pair_similarities, search  # noqa: E402
from utils.evaluation.ijb import IjbEvalSet  # noqa: E402
from utils.flags import flag, parse_flags  # noqa: E402

CSV_COLUMNS = ("date", "device", "torch", "images", "templates", "pairs", "embedding_size", "what", "seconds",
               "peak_mib")
IMAGES, SUBJECTS, GALLERIES, PROBES = 469_375, 3_531, (1_772, 1_759), 19_593  # IJB-C's
PAIRS, GENUINE = 15_658_489, 19_557
SETTINGS = {"flip": True, "detector_score": True, "keep_norm": True, "far_nearest": False}
_ROWS, _CHECKED = 8192, 300


@dataclass(frozen=True)
class Options:
    """The flags of bench_ijb.py."""

    scale: float = flag("--scale", default=1.0, metavar="X", above=0, at_most=1, help="the part of IJB-C's numbers")
    embedding_size: int = flag("--embedding-size", default=512, metavar="D", at_least=2, help="numbers per embedding")
    directory: str | None = flag("--directory", metavar="DIR", help="where the temporary directory is made")
    csv: str | None = flag("--csv", metavar="FILE", help="append a row for each figure")


@dataclass(frozen=True)
class Sizes:
    """IJB-C's numbers, times the scale."""

    images: int
    subjects: int
    probes: int
    pairs: int
    genuine: int

    @property
    def templates(self) -> int:
        """One per subject in a gallery, and the probes."""
        return self.subjects + self.probes


def main() -> None:
    options = parse_flags(Options, "bench_ijb.py", "Seconds and memory of IJB-C without its embeddings.")
    measure.check_csv(options.csv, CSV_COLUMNS)
    sizes = Sizes(*(max(least, round(options.scale * number)) for number, least in (
        (IMAGES, 300), (SUBJECTS, 10), (PROBES, 60), (PAIRS, 400), (GENUINE, 40))))
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        root = os.path.join(directory, "IJBC")
        subject = write_files(root, sizes)
        file = write_embeddings(os.path.join(directory, "IJBC.embeddings"), subject, options.embedding_size)
        rows = run(root, file, asdict(sizes) | {"templates": sizes.templates, "embedding_size": options.embedding_size})
        file.close()
    measure.report(rows, CSV_COLUMNS, "what", options.csv)


def run(root: str, file: EmbeddingFile, common: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table."""
    common |= measure.describe_machine()
    rows: list[dict[str, Any]] = []

    def timed(what: str, work: Callable[[], Any]) -> Any:
        results: list[Any] = []
        measure.restart_peak(measure.CPU)
        seconds = measure.timed(lambda: results.append(work()))
        rows.append({**common, "what": what, "seconds": seconds, "peak_mib": measure.process_mib("VmHWM", "status")})
        return results[0]

    eval_set = timed("open the files", lambda: IjbEvalSet("IJBC", root, "--ijb", SETTINGS))
    check(eval_set, file)
    timed("check the embeddings' checksums", file.missing)
    result = timed("score", lambda: eval_set.score(file))
    eval_set._settings["far_nearest"] = True
    timed("score, --far-nearest", lambda: eval_set.score(file))
    print(result.report + "\n")
    return rows


def check(eval_set: IjbEvalSet, file: EmbeddingFile) -> None:
    """Random pairs and probes against plain loops over images, medias and entries."""
    template, media, scores = eval_set._template, eval_set._media, eval_set._scores
    count = len(eval_set._template_ids)
    templates, _ = fuse_templates(file, template, media, scores, num_templates=count)
    order = np.argsort(template, kind="stable")
    ends = np.cumsum(np.bincount(template, minlength=count))
    fused: dict[int, np.ndarray] = {}

    def slow(t: int) -> np.ndarray:
        if t not in fused:
            medias: dict[int, list[np.ndarray]] = {}
            for i in order[ends[t - 1] if t else 0 : ends[t]]:
                medias.setdefault(int(media[i]), []).append(scores[i] * file[i : i + 1][0].astype(np.float64))
            vector = np.sum([np.mean(rows, axis=0) for rows in medias.values()], axis=0)
            fused[t] = vector / np.linalg.norm(vector)
        return fused[t]

    rng = np.random.default_rng(1)
    pairs = rng.integers(0, len(eval_set._first), _CHECKED)
    first, second = eval_set._first[pairs], eval_set._second[pairs]
    similarity = pair_similarities(templates, first, second)
    for s, a, b in zip(similarity, first, second):
        assert abs(s - slow(int(a)) @ slow(int(b))) < 1e-5, "similarity"
    gallery, probes = eval_set._galleries[0], eval_set._probes
    assert probes is not None
    chosen = rng.integers(0, len(probes.templates), 5)
    few = rng.integers(0, len(gallery.templates), 100)
    found = search(templates[probes.templates[chosen]], probes.subjects[chosen], templates[gallery.templates[few]],
                   gallery.subjects[few])
    for k, q in enumerate(chosen):
        scored = [(slow(int(probes.templates[q])) @ slow(int(gallery.templates[g])),
                   gallery.subjects[g] == probes.subjects[q]) for g in few]
        for is_mate, got in ((True, found.mate[k]), (False, found.other[k])):
            best = max((s for s, mate in scored if mate == is_mate), default=-np.inf)
            assert best == got or abs(best - got) < 1e-5, "search"


def write_files(root: str, sizes: Sizes) -> np.ndarray:
    """The official files. Template t is of subject t in a gallery, or a probe of any subject. Returns each image's."""
    rng = np.random.default_rng(0)
    os.makedirs(os.path.join(root, "meta"))
    os.mkdir(os.path.join(root, "loose_crop"))
    subject_of = np.concatenate([np.arange(sizes.subjects), rng.integers(0, sizes.subjects, sizes.probes)])
    template = np.sort(np.concatenate([np.arange(sizes.templates), rng.integers(
        0, sizes.templates, max(0, sizes.images - sizes.templates))]))[: sizes.images]
    media = np.cumsum(rng.random(len(template)) < 0.3)  # of three images in a row, on average
    points = np.round(TEMPLATE + rng.uniform(-5, 25, (len(template), 5, 2)), 3)
    scores = rng.uniform(0.3, 1, len(template))
    meta = os.path.join(root, "meta", "ijbc_")
    for i in range(len(template)):
        with open(os.path.join(root, "loose_crop", f"{i + 1}.jpg"), "wb"):
            pass
    with open(meta + "name_5pts_score.txt", "w", encoding="ascii") as file:
        file.writelines(f"{i}.jpg {' '.join(map(str, face))} {score:.3f}\n"
                        for i, (face, score) in enumerate(zip(points.reshape(-1, 10).tolist(), scores.tolist()), 1))
    with open(meta + "face_tid_mid.txt", "w", encoding="ascii") as file:
        file.writelines(f"{i}.jpg {t + 1} {m}\n" for i, (t, m) in enumerate(zip(template.tolist(), media.tolist()), 1))
    probes = np.arange(sizes.subjects, sizes.templates)
    with open(meta + "template_pair_label.txt", "w", encoding="ascii") as file:
        genuine = rng.choice(probes, sizes.genuine)
        write_pairs(file, subject_of[genuine], genuine, 1)
        for start in range(0, sizes.pairs - sizes.genuine, 10**6):
            first = rng.integers(0, sizes.subjects, min(10**6, sizes.pairs - sizes.genuine - start))
            second = rng.choice(probes, len(first))
            same = subject_of[second] == first
            write_pairs(file, np.where(same, (first + 1) % sizes.subjects, first), second, 0)
    half = sizes.subjects * GALLERIES[0] // SUBJECTS
    for name, rows in (("gallery_G1", np.arange(half)), ("gallery_G2", np.arange(half, sizes.subjects)),
                       ("probe_mixed", probes)):
        with open(f"{meta}1N_{name}.csv", "w", encoding="ascii") as file:
            file.write("TEMPLATE_ID,SUBJECT_ID\n")
            file.writelines(f"{t + 1},{s}\n" for t, s in zip(rows.tolist(), subject_of[rows].tolist()))
    return subject_of[template]


def write_pairs(file: Any, first: np.ndarray, second: np.ndarray, label: int) -> None:
    """Lines of the pair list; templates are numbered from 1."""
    file.writelines(f"{a + 1} {b + 1} {label}\n" for a, b in zip(first.tolist(), second.tolist()))


def write_embeddings(path: str, subject: np.ndarray, size: int) -> EmbeddingFile:
    """A center per subject plus noise, with norms from 5 to 25."""
    rng = np.random.default_rng(2)
    centers = rng.standard_normal((int(subject.max()) + 1, size), dtype=np.float32)
    file = EmbeddingFile(path, len(subject), size, {})
    for start in range(0, len(subject), _ROWS):
        images = np.arange(start, min(start + _ROWS, len(subject)))
        rows = centers[subject[images]] + 8 * rng.standard_normal((len(images), size), dtype=np.float32)
        rows *= rng.uniform(5, 25, (len(images), 1)).astype(np.float32) / np.linalg.norm(rows, axis=1, keepdims=True)
        file.write(images, rows)
    return file


if __name__ == "__main__":
    exit_on_user_error(main)
