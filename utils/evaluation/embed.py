"""Images -> L2-normalised embeddings, with any backbone, on one or more ranks.

Shapes: n images in a batch, N images in all, d embedding size.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data.augment import prepare_batch
from data.decode import IMAGE_SIZE
from data.loader import read_images
from utils.dist.collectives import all_gather_json, all_gather_rows, all_reduce_sum
from utils.dist.context import DistContext, describe_gpu
from utils.dist.stop import StopSignal
from utils.errors import UserError
from utils.evaluation.embedding_file import EmbeddingFile, backbone_fingerprint
from utils.evaluation.mean_face import SHAPE, describe_difference, relative_faces
from utils.evaluation.protocol import Images
from utils.signals import STOP_SIGNALS


def embed_images(
    backbone: nn.Module, images: Images, context: DistContext, *, batch_size: int, workers: int, flip: bool = False,
    progress: bool = True, print_freq: int = 100, stop: StopSignal | None = None, mean_face: Tensor | None = None,
    name: str = "the images",
) -> np.ndarray:
    """Collective if there is more than one rank. e / |e| with e = f(x), or e = f(x) + f(mirrored x) with `flip`.

    Returns float32 (N, d) on every rank. A zero, NaN or infinite embedding becomes zero, with a warning on stderr.

    Each rank embeds ceil(N / W) consecutive images; the last image pads the final ranks. All ranks need the same
    backbone, including buffers, and the same images.

    Args:
        backbone: f. Moved to the context's device; in evaluation mode here, and back in its own mode afterwards.
        batch_size: images that a rank embeds at a time.
        workers: image reading processes of this node; its ranks share them. 0: each rank reads its own images.
        progress: show a bar on a terminal (stderr), otherwise print a line every `print_freq` batches.
        stop: after each batch the ranks look for stop signals and failures; then Dropped is raised on all of them.
        mean_face: of the images that the backbone was trained on. Rank 0 warns if that of these images is far from it.
        name: what warnings call the images.

    Raises UserError, without `stop`, for an image that cannot be read and for a batch that exceeds the GPU's memory.
    """
    total = len(images)
    share = -(-total // context.world_size)
    own = [min(i, total - 1) for i in range(context.rank * share, (context.rank + 1) * share)]
    rows = torch.empty(0)

    def keep(done: int, output: Tensor) -> None:
        nonlocal rows
        if done == 0:
            rows = torch.empty(share, output.shape[1], device=context.device)  # until all batches are embedded
        rows[done : done + len(output)] = _unit_rows(output)

    faces = _embed(backbone, images, own, max(total - context.rank * share, 0), context, keep, batch_size=batch_size,
                   workers=workers, flip=flip, progress=progress, print_freq=print_freq, stop=stop)
    if context.world_size > 1:
        rows = all_gather_rows(rows, None)[:total]
    rows = rows.cpu()

    zero, not_finite = int((rows == 0).all(dim=1).sum()), int(rows[:, 0].isnan().sum())
    if context.is_main and zero + not_finite:
        print(f"warning: {zero + not_finite} of {total} embeddings are unusable ({not_finite} NaN or infinite, {zero} "
              "zero); they are set to zero", file=sys.stderr)
    _compare_faces(faces, total, context, mean_face, name)
    return rows.nan_to_num_(0).numpy()


def embed_to_file(
    backbone: nn.Module, images: Images, context: DistContext, path: str, made_from: str, *, batch_size: int,
    workers: int, flip: bool = False, progress: bool = True, print_freq: int = 100, mean_face: Tensor | None = None,
    name: str = "the images",
) -> EmbeddingFile:
    """Collective. f(x), or f(x) + f(mirrored x) with `flip`, not normalised, of each image, in a file on a disk that
    all ranks share. Only images whose embeddings are not there yet are embedded, after a kill for example.

    made_from: identifies the images. Embeddings of other images, weights, settings or kinds of device are replaced. The
    other arguments and the errors are those of embed_images. The caller closes the file.
    """
    matmul = describe_gpu(context.device) if context.device.type == "cuda" else ""  # with the precision of its products
    facts = {"weights": backbone_fingerprint(backbone), "made_from": made_from, "flip": flip,
             "device": context.device.type + matmul}
    if context.world_size > 1:
        facts = all_gather_json(facts, context.device)[0]  # another kind of GPU on another node makes no other file
    size, opened = _embedding_size(backbone), list[EmbeddingFile]()

    def open_file() -> None:
        opened.append(EmbeddingFile(path, len(images), size, facts, shared=not context.is_main))

    try:
        _together(open_file if context.is_main else None, context)
        _together(None if context.is_main else open_file, context)
        file = opened[0]
        missing = _together(file.missing, context)  # nobody writes before all have looked
        _require_one_disk(path, context, len(missing), zlib.crc32(missing.tobytes()))
        if context.is_main:
            print(f"=> {name}: {path} holds the embeddings of {len(images) - len(missing):,} of {len(images):,} images",
                  flush=True)
        if len(missing):
            _embed_missing(backbone, images, context, file, missing, batch_size=batch_size, workers=workers, flip=flip,
                           progress=progress, print_freq=print_freq, mean_face=mean_face, name=name)
            if context.world_size > 1:
                _require_one_disk(path, context, len(_together(file.missing, context)))
    except BaseException:
        for file in opened:
            file.close()
        raise
    return file


def _together(work: Callable[[], Any] | None, context: DistContext) -> Any:
    """Collective. work() on this rank; a rank's UserError is raised on all ranks, after all have done their part."""
    result, message = None, ""
    try:
        result = work() if work is not None else None
    except UserError as error:
        message = str(error)
    if context.world_size > 1:
        message = next(filter(None, all_gather_json(message, context.device)), "")
    if message:
        raise UserError(message)
    return result


def _require_one_disk(path: str, context: DistContext, *facts: int) -> None:
    """Collective. Raises UserError on all ranks if they see different files."""
    if context.world_size > 1 and any(other != list(facts) for other in all_gather_json(facts, context.device)):
        raise UserError(f"--embeddings: {path}: the processes see different files; give a directory on a disk that all "
                        "nodes share")


def _embed_missing(
    backbone: nn.Module, images: Images, context: DistContext, file: EmbeddingFile, missing: np.ndarray, *,
    mean_face: Tensor | None, name: str, **settings: Any,
) -> None:
    """Collective. Embed the images `missing`, int64 (n,) and rising, into the file."""
    share = -(-len(missing) // context.world_size)
    real = missing[context.rank * share : (context.rank + 1) * share]
    own = [*real.tolist(), *[int(missing[-1])] * (share - len(real))]

    def keep(done: int, output: Tensor) -> None:
        part = real[done : done + len(output)]
        file.write(part, output[: len(part)].float().cpu().numpy())

    faces = _embed(backbone, images, own, len(real), context, keep, **settings)
    _compare_faces(faces, len(missing), context, mean_face, name)  # collective: all ranks have written after it


def _embedding_size(backbone: nn.Module) -> int:
    """d."""
    size = getattr(backbone, "embedding_size", None)
    if size is None:
        parameter = next(backbone.parameters())
        with torch.no_grad(), _evaluation_mode(backbone):
            size = backbone(parameter.new_zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)).shape[1]
    return int(size)


def _compare_faces(faces: Tensor, count: int, context: DistContext, mean_face: Tensor | None, name: str) -> None:
    """Collective. Rank 0 warns if the mean of all ranks' `faces`, sums over `count` images, is far from mean_face."""
    if context.world_size > 1:
        faces = all_reduce_sum(faces, dist.group.WORLD)
    if context.is_main and mean_face is not None:
        difference = describe_difference(faces.cpu() / count, count, mean_face)
        if difference is not None:
            print(f"warning: {name}: {difference}", file=sys.stderr)


@contextlib.contextmanager
def _evaluation_mode(backbone: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _embed(
    backbone: nn.Module, images: Images, own: Sequence[int], real: int, context: DistContext,
    keep: Callable[[int, Tensor], None], *, batch_size: int, workers: int, flip: bool, progress: bool, print_freq: int,
    stop: StopSignal | None = None,
) -> Tensor:
    """Embed this rank's images `own`, as many on every rank, and give them to keep(images before, (n, d)) by batches.

    The sum of the relative faces of the first `real` images is returned; the others repeat images of other ranks.
    """
    share = len(own)
    # Loading processes ignore SIGINT, and SIGTERM and SIGUSR1 only if this process handles them. Otherwise Python sends
    # SIGTERM to its children at exit and would wait forever for one that ignores it.
    ignored = [number for number in STOP_SIGNALS
               if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_DFL]
    batches = read_images(images, own, batch_size=batch_size, workers=-(-workers // context.processes_per_node),
                          ignored=ignored, stopping=lambda: stop is not None and stop.requested,
                          patience=stop.patience if stop is not None else math.inf)
    backbone.to(context.device)
    dtype = next((p.dtype for p in backbone.parameters() if p.is_floating_point()), torch.float32)
    whose = " of rank 0" if context.world_size > 1 else ""
    report, terminal = progress and context.is_main, sys.stderr.isatty()
    # No disabled bar: tqdm's lock is a semaphore, and a rank that is killed would leak it with a warning.
    bar = tqdm(total=share, desc="embedding", unit=" images" + whose) if report and terminal else None
    done, started = 0, time.perf_counter()
    on_gpu = context.device.type == "cuda"
    faces = torch.zeros(SHAPE, device=context.device)

    def embed_next() -> Tensor:
        batch = next(batches)
        if on_gpu:  # nobody waits for a copy from pinned memory; torch reuses that memory when the copy is over
            batch = batch.pin_memory().to(context.device, non_blocking=True)
        x = prepare_batch(batch, dtype, augment="none")
        faces.add_(relative_faces(x[:max(real - done, 0)]).sum(0))
        output = backbone(x)
        return output + backbone(x.flip(3)) if flip else output

    try:
        with torch.no_grad(), _evaluation_mode(backbone):
            for _ in range(-(-share // batch_size)):  # as many batches on every rank
                output = embed_next() if stop is None else stop.together(embed_next)
                keep(done, output)
                done += len(output)
                if bar is not None:
                    bar.update(len(output))
                elif report and (done % (batch_size * print_freq) == 0 or done == share):
                    rate = done / (time.perf_counter() - started)
                    print(f"embedded {done}/{share} images{whose}, {rate:.1f} images/s", flush=True)
    except torch.OutOfMemoryError:
        raise UserError(f"--batch-size {batch_size}: does not fit into the GPU's memory; use a smaller one") from None
    finally:
        batches.close()
        if bar is not None:
            bar.close()
    return faces


def _unit_rows(output: torch.Tensor) -> torch.Tensor:
    """(n, d) -> float32 (n, d) of unit length. Zero rows stay zero; rows that are not finite become NaN."""
    output = output.double()  # the length of a float32 vector neither overflows nor underflows in float64
    length = torch.linalg.vector_norm(output, dim=1, keepdim=True)
    unit = torch.where(length > 0, output / length, 0)
    return torch.where(torch.isfinite(length), unit, torch.nan).float()


@contextlib.contextmanager
def buffers_of_rank_0(context: DistContext, module: nn.Module) -> Iterator[None]:
    """Collective. Give every rank's module the buffers of rank 0, and restore each rank's own at the end, bit for bit.

    BatchNorm statistics differ between ranks during training, because each rank sees other images. A checkpoint holds
    those of rank 0.
    """
    own = [buffer.clone() for buffer in module.buffers()]
    if context.world_size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
    try:
        yield
    finally:
        for buffer, value in zip(module.buffers(), own):
            buffer.copy_(value)
