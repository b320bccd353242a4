"""The kinds of evaluation set; opening sets, checking their images, evaluating a backbone on them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import nn

from data.progress import progress_bar
from utils.dist.context import DistContext
from utils.dist.stop import StopSignal
from utils.errors import UserError
from utils.evaluation.embed import embed_images
from utils.evaluation.pairs import open_bin, open_pair_list
from utils.evaluation.protocol import EvalSet, Images, Result

# Each opener takes the set's name, its path, the directory of its images or None, the flag to name in UserErrors, and
# whether pairs without an image are left out.
EVAL_SETS: dict[str, Callable[[str, str, str | None, str, bool], EvalSet]] = {"pairs": open_pair_list, "bin": open_bin}

_DECODING_THREADS = 8  # the decoders release the GIL


@dataclass(frozen=True)
class Source:
    """Where to find an evaluation set."""

    kind: str  # a key of EVAL_SETS
    path: str
    flag: str  # the user's, for messages
    imgs_root: str | None = None  # its images, if they are elsewhere
    skip_missing: bool = False  # --skip-missing-pairs


def open_sets(sources: Sequence[Source]) -> list[EvalSet]:
    """Open the sets, in this order. Raises UserError.

    A set takes its file's name without the extension, or its directory's name if the file is called pair.list, or the
    whole path where two sets would share a name.
    """
    names, paths = [_short_name(source.path) for source in sources], [source.path for source in sources]
    for number, source in enumerate(sources):
        if source.path in paths[:number]:
            raise UserError(f"{source.flag} {source.path}: given twice; drop one")
    return [EVAL_SETS[source.kind](name if names.count(name) == 1 else source.path, source.path, source.imgs_root,
                                   source.flag, source.skip_missing) for name, source in zip(names, sources)]


def _short_name(path: str) -> str:
    directory, file = os.path.split(os.path.abspath(path))
    return os.path.basename(directory) if file == "pair.list" else os.path.splitext(file)[0]


def check_images(sets: Iterable[EvalSet], progress: bool) -> None:
    """Decode every image once, so that a bad one is reported before hours of work. Raises its UserError.

    progress: show a bar on stderr if that is a terminal and the check takes longer than a second.
    """
    for eval_set in sets:
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
                 **settings: Any) -> Result | None:
    """Collective. Embed the set's images on all ranks and score them on rank 0; the other ranks return None.

    stop, settings: those of embed_images. Raises UserError for an image that cannot be read; with `stop`, Dropped.
    """
    embeddings = embed_images(backbone, eval_set.images, context, stop=stop, name=eval_set.name, **settings)

    def score() -> Result | None:
        return eval_set.score(embeddings) if context.is_main else None

    return score() if stop is None else stop.together(score)
