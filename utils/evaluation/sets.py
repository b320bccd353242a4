"""The kinds of evaluation set; opening sets, checking their images, evaluating a backbone on them."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import nn

from data.progress import progress_bar
from utils.dist.context import DistContext
from utils.dist.stop import StopSignal
from utils.errors import UserError
from utils.evaluation.embed import embed_images, embed_to_file
from utils.evaluation.embedding_file import default_directory
from utils.evaluation.ijb import IjbFlags, open_ijb
from utils.evaluation.pairs import open_bin, open_pair_list
from utils.evaluation.protocol import EvalSet, Images, Result, Source
from utils.evaluation.tinyface import TinyFaceFlags, open_tinyface
from utils.flags import flag

# Each opener takes the set's name and its source, and raises UserError.
EVAL_SETS: dict[str, Callable[[str, Source], EvalSet]] = {
    "pairs": open_pair_list, "bin": open_bin, "ijb": open_ijb, "tinyface": open_tinyface}

_DECODING_THREADS = 8  # the decoders release the GIL


@dataclass(frozen=True, kw_only=True)
class SetFlags(TinyFaceFlags, IjbFlags):
    """The flags of the sets that only valid.py evaluates."""

    embeddings: str | None = flag(
        "--embeddings", metavar="DIR", section="evaluation sets", default_text="among the user's caches",
        help="with --ijb and --tinyface: where the images' embeddings are kept, so that an interrupted evaluation "
             "continues, and another one with the same weights and --flip need not embed again")

    def sources(self, flip: bool) -> list[Source]:
        """The sets that the flags choose. Raises UserError for a flag without effect."""
        sources = [*self.ijb_sources(flip), *self.tinyface_sources(flip)]
        if self.embeddings is not None and not sources:
            raise UserError(f"--embeddings {self.embeddings}: has no effect without --ijb or --tinyface; drop it")
        return sources


def open_sets(sources: Sequence[Source]) -> list[EvalSet]:
    """Open the sets, in this order. Raises UserError.

    A set takes its file's name without the extension, or its directory's name if the file is called pair.list, or the
    whole path where two sets would share a name.
    """
    names, paths = [_short_name(source.path) for source in sources], [source.path for source in sources]
    for number, source in enumerate(sources):
        if source.path in paths[:number]:
            raise UserError(f"{source.flag} {source.path}: given twice; drop one")
    return [EVAL_SETS[source.kind](name if names.count(name) == 1 else source.path, source)
            for name, source in zip(names, sources)]


def _short_name(path: str) -> str:
    directory, file = os.path.split(os.path.abspath(path))
    return os.path.basename(directory) if file == "pair.list" else os.path.splitext(file)[0]


def check_images(sets: Iterable[EvalSet], progress: bool) -> None:
    """Decode every image once, so that a bad one is reported before hours of work. Raises its UserError.

    Not those of sets whose embeddings go to a file: decoding takes them long, and an error there loses nothing.

    progress: show a bar on stderr if that is a terminal and the check takes longer than a second.
    """
    for eval_set in sets:
        if eval_set.fingerprint is not None:
            continue
        total = len(eval_set.images)
        with ThreadPoolExecutor(_DECODING_THREADS) as threads, \
                progress_bar(f"checking {eval_set.name}", total, enabled=progress) as bar:
            chunks = [range(start, min(start + 64, total)) for start in range(0, total, 64)]
            try:
                for chunk, _ in zip(chunks, threads.map(functools.partial(_decode, eval_set.images), chunks)):
                    bar.update(len(chunk))
            except UserError:
                threads.shutdown(wait=False, cancel_futures=True)
                raise


def _decode(images: Images, chunk: range) -> None:
    for i in chunk:
        images[i]


def evaluate_set(backbone: nn.Module, eval_set: EvalSet, context: DistContext, *, stop: StopSignal | None = None,
                 embeddings: str | None = None, **settings: Any) -> Result | None:
    """Collective. Embed the set's images on all ranks and score them on rank 0; the other ranks return None.

    embeddings: the directory of --embeddings. stop, settings: those of embed_images. Raises UserError for an image that
    cannot be read; with `stop`, Dropped.
    """
    if eval_set.fingerprint is not None:
        assert stop is None
        path = os.path.join(embeddings or default_directory(), _file_name(eval_set.name))
        file = embed_to_file(backbone, eval_set.images, context, path, eval_set.fingerprint, name=eval_set.name,
                             **settings)
        try:
            return eval_set.score(file) if context.is_main else None
        finally:
            file.close()
    rows = embed_images(backbone, eval_set.images, context, stop=stop, name=eval_set.name, **settings)

    def score() -> Result | None:
        return eval_set.score(rows) if context.is_main else None

    return score() if stop is None else stop.together(score)


def _file_name(name: str) -> str:
    """Of the embeddings of the set with this name, which may be a path."""
    known = re.fullmatch(r"[\w-][\w.-]{0,99}", name)
    return (name if known else hashlib.sha256(os.fsencode(name)).hexdigest()[:32]) + ".embeddings"
