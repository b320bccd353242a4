#!/usr/bin/env python3
"""Photos -> aligned 112x112 faces, as the published evaluations align them. Folders stay folders.

    python3 scripts/align.py DIR OUT --landmarks FILE    # the landmarks are known
    python3 scripts/align.py DIR OUT --detector mtcnn    # they are found, by a package that is installed separately

    OUT/<the photo's folder and name>.jpg    the crops; with --several all, <name>.face0.jpg, .face1.jpg, ...
    OUT/align.csv                            a row for each crop, and for each photo that gave none
    OUT/align.json                           the settings

The columns of align.csv: photo; crop ("" if there is none); status; reason; faces, the number found in the photo; eyes,
the distance of a frontal face's eyes at this size, in pixels of the photo; landmarks, a checksum of those in FILE.

    status        aligned, or why there is no crop:
    no face       FILE does not name the photo, or the detector found nothing
    tiny          the eyes are closer than --min-eyes
    landmarks     not finite, all at one place, outside of the photo, or left and right are swapped
    unreadable    the photo is damaged, too large or not an image
    name          the crop's name would be too long

After an interruption, or when photos were added, the same command continues: it aligns what has no crop, and photos
that have changed since, or their landmarks. FILE has a line for each face. See scripts/README.md for its layouts.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import glob
import importlib
import io
import itertools
import json
import os
import re
import signal
import sys
import time
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NamedTuple, TextIO

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

import numpy as np
import torch
from PIL import Image

from data.align import TEMPLATE, align_face, similarity_transform  # noqa: E402
from data.decode import read_photo  # noqa: E402
from data.progress import progress_bar  # noqa: E402
from scripts.embed import find_images  # noqa: E402
from utils.errors import UserError, exit_on_user_error  # noqa: E402
from utils.files import atomic_write, move_aside, open_regular, require_directory  # noqa: E402
from utils.flags import flag, parse_flags  # noqa: E402
from utils.signals import end_with_parent  # noqa: E402

TABLE, SETTINGS = "align.csv", "align.json"
_JOURNAL, _TEMPORARY = ".align.partial.csv", ".align-{}.part"  # in OUT, where they are hidden
_VERSION = 1  # of the crops: increase it when they change
_JPEG = {"quality": 95, "subsampling": 0}
_SWAPPED = [1, 0, 2, 4, 3]  # the landmarks with left and right exchanged
_EYES = float(np.linalg.norm(TEMPLATE[1] - TEMPLATE[0]))
_MIN_SCALE = 1e-12  # squared; align_face refuses less
_TEXT: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # keeps any file name
_MAX_LINE = 2**16  # bytes in a line of FILE
_INSTALL = "python3 -m pip install requests && python3 -m pip install --no-deps facenet-pytorch"


@dataclass(frozen=True)
class Options:
    """The arguments of align.py."""

    photos: str = flag("photos", default="", metavar="DIR", help="the photos, in folders of any depth")
    out: str = flag("out", default="", metavar="OUT", help="directory for the crops")
    landmarks: str | None = flag("--landmarks", metavar="FILE",
                                 help="text or CSV with five landmarks of each face: eyes, nose, corners of the mouth")
    detector: str | None = flag("--detector", choices=("mtcnn",),
                                help="find the faces and their landmarks: facenet-pytorch's MTCNN")
    several: str = flag("--several", default="largest", choices=("largest", "center", "all"),
                        help="which face of several: the largest, the one closest to the photo's center, or all")
    min_eyes: float = flag("--min-eyes", default=10.0, metavar="PIXELS", at_least=0,
                           help="leave out faces whose eyes would be closer than that in a frontal view")
    format: str = flag("--format", default="jpg", choices=("jpg", "png"),
                       help="of the crops; jpg has quality 95 and full color resolution")
    ignore_exif: bool = flag("--ignore-exif", default=False,
                             help="do not turn photos as their EXIF orientation says; the landmarks are of the "
                                  "pixels as they are stored")
    workers: int = flag("-j", "--workers", default=4, metavar="N", at_least=0,
                        help="aligning processes; 0 aligns in the main process")
    force: bool = flag("--force", default=False,
                       help="align all photos again; an OUT that exists is renamed to OUT.1, or the next free number")


class Row(NamedTuple):
    """A row of align.csv."""

    photo: str
    crop: str
    status: str
    reason: str
    faces: int
    eyes: str = ""
    landmarks: str = ""


class Task(NamedTuple):
    """A photo, its crop's name without extension, and its landmarks: numbers x1, y1, ..., y5 for each face, or None."""

    photo: str
    crop: str
    landmarks: array | None


def main() -> None:
    options = parse_flags(Options, "align.py", "Photos -> aligned 112x112 faces.")
    try:
        align(options)
    except OSError as error:
        raise UserError(f"{error.filename or options.out}: {error.strerror or error}") from None
    except BrokenProcessPool:
        raise UserError("a process that aligns has ended (out of memory? see dmesg); the same command continues, with "
                        "fewer of them: -j 1") from None


def align(options: Options) -> None:
    """All of the program but its command line. Raises UserError, OSError and BrokenProcessPool."""
    started = time.perf_counter()
    check_options(options)
    photos, out = options.photos.rstrip("/") or "/", options.out
    names = [path[len(os.path.join(photos, "")):] for path in find_images([photos])]
    landmarks = None if options.landmarks is None else read_landmarks(options.landmarks, names, photos)
    crops = crop_names(names)
    open_directory(options)
    with open(os.path.join(out, _JOURNAL), "a", **_TEXT) as journal:
        lock(journal, out)
        for old in glob.glob(os.path.join(glob.escape(out), _TEMPORARY.format("*"))):
            os.unlink(old)
        rows = read_rows(os.path.join(out, TABLE)) | read_rows(journal.name)
        done = {photo: of_photo for photo, of_photo in rows.items()
                if is_finished(of_photo, options, None if landmarks is None else landmarks.get(photo, array("d")))}
        table = [row for name in names for row in done.get(name, ())]
        gone = [row for photo in rows.keys() - set(names) for row in rows[photo] if row.crop]
        tasks = tasks_of(names, crops, landmarks, rows, done, out)
        write = csv.writer(journal).writerow
        write(())  # ends a line that a kill has cut
        with contextlib.closing(run_all(tasks, options)) as results:
            for new in progress_bar("aligning", len(names), iterable=results, initial=len(done), unit="photo"):
                for row in new:
                    write(row)
                journal.flush()
                table += new
        os.sync()  # before the table says that the crops are there; an fsync of each would take hours
        with atomic_write(os.path.join(out, TABLE)) as file:
            text = io.TextIOWrapper(file, write_through=True, **_TEXT)
            csv.writer(text).writerows([Row._fields, *sorted(table + gone, key=lambda row: row.photo)])
            text.detach()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(journal.name)
    report(options, len(names), len(done), table, len({row.photo for row in gone}), time.perf_counter() - started)


def check_options(options: Options) -> None:
    """Raises UserError for what does not need the photos."""
    for name, value in ("DIR", options.photos), ("OUT", options.out):
        if not value:
            what = "of the photos" if name == "DIR" else "to create"
            raise UserError(f"{name} is missing: give the directory {what}")
    if (options.landmarks is None) == (options.detector is None):
        raise UserError("give either --landmarks FILE, or --detector mtcnn to find the landmarks")
    if not os.path.isdir(options.photos):
        what = "is a file" if os.path.exists(options.photos) else "no such directory"
        raise UserError(f"DIR {options.photos}: {what}; give the directory of the photos")
    places = [os.path.realpath(path) for path in (options.photos, options.out)]
    if os.path.commonpath(places) in places:
        raise UserError(f"OUT {options.out}: DIR {options.photos} is the same directory, or one of the two holds the "
                        "other; give a directory beside it")
    if options.detector is not None:
        load_mtcnn(options.min_eyes)  # what is wrong with the package is found here, not in other processes


def open_directory(options: Options) -> None:
    """Create OUT with its settings, or continue in one with the same settings. Raises UserError."""
    out, path = options.out.rstrip("/"), os.path.join(options.out, SETTINGS)
    settings = {"version": _VERSION, **asdict(options), "photos": os.path.realpath(options.photos)}
    for name in ("out", "workers", "force"):
        del settings[name]
    if options.landmarks is not None:
        settings["landmarks"] = os.path.realpath(options.landmarks)
    found = None
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError), open_regular(path) as file:
        found = json.loads(file.read(2**20))
    if found == settings and not options.force:
        return
    if os.path.lexists(out) and not os.path.isdir(out):
        raise UserError(f"OUT {options.out}: is a file; give a directory")
    if os.path.lexists(out) and os.listdir(out):
        if not isinstance(found, dict) or "min_eyes" not in found:
            raise UserError(f"OUT {options.out}: is not empty and not from this program; give another directory")
        if not options.force:
            changed = ", ".join(name for name in settings if found.get(name) != settings[name]) or "version"
            raise UserError(f"OUT {options.out}: holds crops that were made with other settings ({changed}); give "
                            "another directory, or --force to rename it and align all photos again")
        with contextlib.suppress(FileNotFoundError), open(os.path.join(out, _JOURNAL), "r+") as journal:
            lock(journal, out)
        print(f"=> {out} was renamed to {move_aside(out)}", file=sys.stderr)
    require_directory("OUT", out)
    with atomic_write(path) as file:
        file.write(json.dumps(settings, indent=2).encode() + b"\n")


def lock(journal: TextIO, out: str) -> None:
    """Raises UserError if another process has the lock. It ends with the process, or when the file is closed."""
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"OUT {out}: another process is writing there; wait for it, or give another OUT") from None


def crop_names(names: list[str]) -> list[str]:
    """The crop of each photo, without its extension. Photos that differ only in their extension keep theirs in it.

    Raises UserError if two photos would have one crop all the same.
    """
    stems = [os.path.splitext(name)[0] for name in names]
    count = Counter(stems)
    # Else photo `a.face0.jpg` could have the crop of the first face in photo `a.jpg`.
    whole = {name for name, stem in zip(names, stems) if count[stem] > 1 or re.search(r"\.face\d+$", stem)}
    for name, stem in zip(names, stems):
        if stem in whole and name not in whole:
            raise UserError(f"DIR: the photos {stem} and {name} would have one crop; rename one of them")
    return [name if name in whole else stem for name, stem in zip(names, stems)]


def tasks_of(names: list[str], crops: list[str], landmarks: dict[str, array] | None, rows: dict[str, list[Row]],
             done: dict[str, list[Row]], out: str) -> Iterator[Task]:
    """The photos that are not done. Removes the crops that they had, because they may get none, or fewer."""
    for name, crop in zip(names, crops):
        if name in done:
            continue
        for row in rows.get(name, ()):
            if re.fullmatch(re.escape(crop) + r"(\.face\d+)?\.(jpg|png)", row.crop):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(out, row.crop))
        yield Task(name, crop, None if landmarks is None else landmarks.get(name, array("d")))


def checksum(landmarks: array | None) -> str:
    return "" if landmarks is None else f"{zlib.crc32(landmarks.tobytes()):08x}"


def read_rows(path: str) -> dict[str, list[Row]]:
    """{photo: its rows} of a table or journal; of a photo that was aligned again, the later ones.

    Lines that a kill has damaged are left out.
    """
    rows: dict[str, list[Row]] = {}
    previous = None
    with contextlib.suppress(FileNotFoundError, csv.Error), open(path, **_TEXT) as file:
        for cells in csv.reader(line.replace("\0", "") for line in file):
            if len(cells) != len(Row._fields) or not (cells[4].isdecimal() and len(cells[4]) < 10):
                previous = None  # as the empty line with which each run begins
                continue
            photo, crop, status, reason, faces, eyes, landmarks = cells
            if photo != previous:
                rows[photo] = []
            rows[photo].append(Row(photo, crop, status, reason, int(faces), eyes, landmarks))
            previous = photo
    return rows


def is_finished(rows: list[Row], options: Options, landmarks: array | None) -> bool:
    """Whether a photo has all of its rows and crops, from these landmarks, and at least one crop.

    No crop may be older than the photo.
    """
    crops = [os.path.join(options.out, row.crop) for row in rows if row.crop]
    expected = rows[0].faces if options.several == "all" else 1
    if not crops or len(rows) != expected or rows[0].landmarks != checksum(landmarks):
        return False
    try:
        # Unlike mtime, ctime is also new for a file that replaced another one.
        changed = os.stat(os.path.join(options.photos, rows[0].photo)).st_ctime_ns
        return all(state.st_size > 0 and state.st_mtime_ns >= changed for state in map(os.stat, crops))
    except (OSError, ValueError):
        return False


def report(options: Options, photos: int, before: int, table: list[Row], gone: int, seconds: float) -> None:
    """Print the counts. Raises UserError if there is not a single crop."""
    path = os.path.join(options.out, TABLE)
    counts = Counter(row.status for row in table)
    examples = {row.status: row for row in reversed(table)}
    others = "; ".join(f"{counts[status]:,} {status} ({row.photo}: {row.reason})"
                       for status, row in examples.items() if status != "aligned")
    if not counts["aligned"]:
        raise UserError(f"{options.photos}: no photo gave a crop: {others}; see {path}")
    several = len({row.photo for row in table if row.faces > 1})
    print(f"=> {options.out}: {counts['aligned']:,} crops of {photos:,} photos"
          + (f", {before:,} of the photos were aligned before" if before else "")
          + (f", {several:,} photos have several faces" if several else "") + f", {seconds:.1f} s")
    if others:
        print(f"   left out: {others}")
    if gone:
        print(f"warning: OUT {options.out}: has crops of {gone:,} photos that are not in DIR any more", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# One photo


class Aligner:
    """Aligns photos. A process has one."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._detect = load_mtcnn(options.min_eyes) if options.detector is not None else None

    def __call__(self, task: Task) -> list[Row]:
        """Write the crops of a photo. Returns its rows: at least one. Raises OSError if a crop cannot be written."""
        return [row._replace(landmarks=checksum(task.landmarks)) for row in self._align(task)]

    def _align(self, task: Task) -> list[Row]:
        name, options = task.photo, self._options
        faces = np.reshape(task.landmarks or (), (-1, 5, 2))
        if self._detect is None and not len(faces):
            return [Row(name, "", "no face", f"{os.path.basename(options.landmarks or '')} does not name it", 0)]
        path = os.path.join(options.photos, name)
        try:
            photo = read_photo(path, exif=not options.ignore_exif)
        except UserError as error:
            return [Row(name, "", "unreadable", str(error).removeprefix(f"{path}: "), len(faces))]
        if self._detect is not None:
            try:
                faces = self._detect(photo)
            except (RuntimeError, ValueError, IndexError) as error:  # its own mistakes, with odd sizes for example
                return [Row(name, "", "no face", f"the detector failed: {' '.join(str(error).split())[:200]}", 0)]
            if not len(faces):
                return [Row(name, "", "no face", "the detector found none", 0)]

        judged = [judge(face, photo.shape[1], photo.shape[0]) for face in faces]
        usable = [i for i, (problem, _) in enumerate(judged) if not problem]
        if options.several == "all":
            chosen, note = list(range(len(faces))), ""
        elif options.several == "largest":
            chosen, note = [max(usable, key=lambda i: judged[i][1], default=0)], "the largest"
        else:
            middle = np.array(photo.shape[1::-1]) / 2
            distance = np.linalg.norm(faces.mean(axis=1) - middle, axis=1)
            chosen, note = [min(usable, key=lambda i: distance[i], default=0)], "the one closest to the center"
        rows = []
        for i in chosen:
            problem, eyes = judged[i]
            size = f"{eyes:.1f}" if 0 < eyes < 1e6 else ""
            if problem:
                rows.append(Row(name, "", "landmarks", problem, len(faces), size))
            elif eyes < options.min_eyes:
                reason = f"the eyes are {size} pixels apart, and should be {options.min_eyes:g} at least"
                rows.append(Row(name, "", "tiny", reason, len(faces), size))
            else:
                crop = f"{task.crop}{f'.face{i}' if options.several == 'all' else ''}.{options.format}"
                try:
                    self._write(align_face(photo, faces[i]), os.path.join(options.out, crop))
                except OSError as error:
                    if error.errno != errno.ENAMETOOLONG:
                        raise
                    rows.append(Row(name, "", "name", "the crop's name would be too long", len(faces), size))
                    continue
                rows.append(Row(name, crop, "aligned", f"{len(faces)} faces, {note}" if note and len(faces) > 1 else "",
                                len(faces), size))
        return rows

    def _write(self, crop: np.ndarray, path: str) -> None:
        temporary = os.path.join(self._options.out, _TEMPORARY.format(os.getpid()))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "wb") as file:
            if self._options.format == "png":
                Image.fromarray(crop).save(file, "PNG")
            else:
                Image.fromarray(crop).save(file, "JPEG", **_JPEG)
        os.replace(temporary, path)


def judge(face: np.ndarray, width: int, height: int) -> tuple[str, float]:
    """(what is wrong with the landmarks (5, 2), or ""; the distance of a frontal face's eyes in pixels)."""
    # The squared scales, photo -> crop.
    scale, swapped = (similarity_transform(np.stack([face, face[_SWAPPED]]))[:, 0, :2] ** 2).sum(axis=-1)
    if not scale > _MIN_SCALE:
        return "they are not finite, or all at one place", 0.0
    eyes = _EYES / float(scale) ** 0.5
    if swapped > 2 * scale:  # a profile, in which the eyes nearly coincide, fits both ways alike
        return "left and right are swapped: first must come the eye, and the corner, on the left of the photo", eyes
    if not ((0 <= face.mean(axis=0)) & (face.mean(axis=0) <= (width - 1, height - 1))).all():
        return f"the face lies outside of the photo, which is {width}x{height}", eyes
    return "", eyes


def load_mtcnn(min_eyes: float) -> Callable[[np.ndarray], np.ndarray]:
    """A function from a photo, uint8 (H, W, 3) in RGB, to the landmarks of its faces: float64 (faces, 5, 2).

    Raises UserError if the package is missing or cannot be used.
    """
    try:
        module = importlib.import_module("facenet_pytorch")
        # A face is 2.4 times as wide as its eyes are apart. The smallest one decides how long the search takes.
        mtcnn = module.MTCNN(min_face_size=max(20, int(2 * min_eyes)), device=torch.device("cpu"))
    except Exception as error:  # what other versions of torch and numpy make of the package
        missing = isinstance(error, ImportError) and importlib.util.find_spec("facenet_pytorch") is None
        reason = "is not installed" if missing else f"cannot be used ({' '.join(str(error).split())[:200]})"
        raise UserError(f"--detector mtcnn: the package facenet-pytorch {reason}; {_INSTALL}") from None

    def detect(photo: np.ndarray) -> np.ndarray:
        if min(photo.shape[:2]) < mtcnn.min_face_size:
            return np.empty((0, 5, 2))
        boxes, scores, points = mtcnn.detect(Image.fromarray(photo), landmarks=True)
        if boxes is None:
            return np.empty((0, 5, 2))
        return np.asarray(points, dtype=np.float64)[np.asarray(scores, dtype=np.float64) >= 0.9]

    return detect


# ---------------------------------------------------------------------------------------------------------------------
# All photos

_aligner: Aligner  # in each process of the pool


def run_all(tasks: Iterator[Task], options: Options) -> Generator[list[Row], None, None]:
    """The rows of each task, in order."""
    if not options.workers:
        yield from map(Aligner(options), tasks)
        return
    pool = ProcessPoolExecutor(options.workers, initializer=_start, initargs=(options,))
    waiting = deque[Future[list[list[Row]]]]()  # not all at once: there may be millions
    size = 16 if options.detector is None else 1
    try:
        while chunk := list(itertools.islice(tasks, size)):
            waiting.append(pool.submit(_run, chunk))
            if len(waiting) > 4 * options.workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:  # after Ctrl-C, without what has not begun
        pool.shutdown(cancel_futures=True)


def _start(options: Options) -> None:
    global _aligner
    end_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _aligner = Aligner(options)


def _run(tasks: list[Task]) -> list[list[Row]]:
    return [_aligner(task) for task in tasks]


# ---------------------------------------------------------------------------------------------------------------------
# The file of landmarks

_POINTS = [("lefteye", "eyeleft"), ("righteye", "eyeright"), ("nose", "nosetip"), ("leftmouth", "mouthleft"),
           ("rightmouth", "mouthright")]
_COLUMNS = {name: 2 * i + axis for i, words in enumerate(_POINTS) for axis, letter in enumerate("xy")
            for name in (f"{letter}{i + 1}", f"p{i + 1}{letter}", *(word + letter for word in words))}
_NAME_COLUMNS = {"name", "nameid", "image", "imageid", "imagename", "imagepath", "img", "filename", "file", "path",
                 "photo"}
_LAYOUTS = ("lines of name x1 y1 ... x5 y5 [score] with blanks, tabs, commas or semicolons, or a header with columns "
            "such as x1,y1,...,x5,y5 or lefteye_x,lefteye_y,righteye_x,...")

# The cells of a line -> (name, its ten numbers); ("", []) if it is damaged.
Parse = Callable[[list[str]], tuple[str, list[str]]]


def read_landmarks(path: str, names: list[str], directory: str) -> dict[str, array]:
    """{photo: x1, y1, ..., y5 of each of its faces} for those of the photos `names` in `directory` that the file names.

    What is not a number becomes NaN. Lines that cannot be read, or that name other photos, are counted and said on
    stderr. The file may be larger than memory. Raises UserError and OSError.
    """
    stems = Counter(os.path.splitext(name)[0] for name in names)
    known = {stem: name for name in names if stems[stem := os.path.splitext(name)[0]] == 1}  # VGGFace2 names these
    known |= {name: name for name in names}
    prefixes = [os.path.join(prefix, "") for prefix in (os.path.normpath(directory), os.path.realpath(directory))]

    def find(name: str) -> str | None:
        if name not in known:
            name = os.path.normpath(name)
            name = next((name[len(prefix):] for prefix in prefixes if name.startswith(prefix)), name)
        return known.get(name)

    faces: dict[str, array] = {}
    lines = unknown = unread = unread_line = 0
    example = ""
    for number, name, values in _faces(path, find):
        lines += 1
        if not name:
            unread, unread_line = unread + 1, unread_line or number
        elif (photo := find(name)) is None:
            unknown, example = unknown + 1, example or name
        else:
            faces.setdefault(photo, array("d")).extend(_numbers(values))
    if not faces:
        what = (f" a photo of DIR {directory}: the first has {example[:80]!r}, and a photo is {names[0]!r}" if example
                else " a face")
        raise UserError(f"--landmarks {path}: none of its {lines:,} lines names{what}; expected {_LAYOUTS}, and names "
                        "relative to DIR")
    if unread:
        print(f"warning: --landmarks {path}: {unread:,} of {lines:,} lines cannot be read, such as line {unread_line}",
              file=sys.stderr)
    if unknown:
        print(f"warning: --landmarks {path}: {unknown:,} of {lines:,} lines name photos that are not in DIR, such as "
              f"{example[:80]!r}", file=sys.stderr)
    return faces


def _faces(path: str, find: Callable[[str], str | None]) -> Iterator[tuple[int, str, list[str]]]:
    """(number of the line, name, ten numbers as text) of each face; "" and [] for a damaged line. Raises UserError."""
    try:
        opened = open_regular(path)
    except OSError as error:
        raise UserError(f"--landmarks {path}: cannot be read ({error.strerror})") from None
    with opened as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"--landmarks {path}: is UTF-16; save it as UTF-8; expected {_LAYOUTS}")
        file.seek(0)
        numbered = _lines(file)
        number, first = next(numbered, (0, ""))
        while first.startswith("#") and find(first.split()[0]) is None:  # comments
            number, first = next(numbered, (0, ""))
        if not number:
            raise UserError(f"--landmarks {path}: is empty; expected {_LAYOUTS}")
        if first.strip().isdecimal():  # CelebA: the number of lines
            number, first = next(numbered, (0, ""))
        separator = next((one for one in ",;\t" if first.count(one) >= 9), None)
        glue, cells = separator or " ", _split(first, separator)
        parse = _with_header(cells, glue)
        if parse is None:
            parse = _without_header(glue, find)
            name, values = parse(cells)
            if find(name) is None and not np.isfinite(_numbers(values)).any():
                raise UserError(f"--landmarks {path}: line {number}, {first.strip()[:80]!r}, is neither a face nor a "
                                f"header of ten columns; expected {_LAYOUTS}")
            yield number, name, values
        for number, line in numbered:
            yield number, *parse(_split(line, separator))


def _with_header(header: list[str], glue: str) -> Parse | None:
    """The parser for the lines below this header, or None if the line is not a header."""
    keys = [re.sub("[^a-z0-9]", "", cell.lower()) for cell in header]
    places = {_COLUMNS[key]: i for i, key in enumerate(keys) if key in _COLUMNS}
    if len(places) < len(_POINTS) * 2:
        return None
    columns = [places[i] for i in range(len(places))]
    # CelebA's header has no column for the name, which comes first.
    name_at = next((i for i, key in enumerate(keys) if key in _NAME_COLUMNS), -1 if 0 in columns else 0)

    def parse(cells: list[str]) -> tuple[str, list[str]]:
        more = len(cells) - len(header)  # cells that a name with separators in it takes
        if more == 0 and name_at >= 0:
            return cells[name_at], [cells[i] for i in columns]
        if more > 0 and name_at <= 0:
            return glue.join(cells[:more + name_at + 1]), [cells[i + more] for i in columns]
        return "", []

    return parse


def _without_header(glue: str, find: Callable[[str], str | None]) -> Parse:
    """How to parse lines of name x1 y1 ... x5 y5 [score]. A name may have blanks: the photos that are there decide."""
    lengths: list[int] = []  # whether this file has the score, when a line has shown it

    def parse(cells: list[str]) -> tuple[str, list[str]]:
        possible = [length for length in (10, 11) if len(cells) > length and find(glue.join(cells[:-length]))]
        if len(possible) == 1 and not lengths:
            lengths.extend(possible)
        length = next((one for one in lengths + possible if one in possible), 11 if len(cells) > 11 else 10)
        if len(cells) > length:
            return glue.join(cells[:-length]), cells[-length:][:10]
        return (cells[0], []) if cells and find(cells[0]) else ("", [])

    return parse


def _lines(file: BinaryIO) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are not blank. One that is too long is "\\0"."""
    number = 0
    while line := file.readline(_MAX_LINE):
        number += 1
        if len(line) == _MAX_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(_MAX_LINE)
            line = b"\0"
        text = os.fsdecode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).rstrip("\r\n")
        if text.strip():
            yield number, text


def _split(line: str, separator: str | None) -> list[str]:
    """The cells of a line. separator: None for blanks; others may be quoted, as in CSV."""
    if separator is None:
        return line.split()
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]
    except csv.Error:
        return []


def _numbers(values: list[str]) -> list[float]:
    """Ten numbers; all NaN if one of them is none."""
    try:
        return [float(value) for value in values] if len(values) == 10 else [np.nan] * 10
    except ValueError:
        return [np.nan] * 10


if __name__ == "__main__":
    exit_on_user_error(main)
