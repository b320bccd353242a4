"""Evaluating the backbone while it trains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.dist.context import DistContext
from utils.dist.stop import StopSignal
from utils.evaluation.embed import buffers_of_rank_0
from utils.evaluation.protocol import EvalSet, Result
from utils.evaluation.sets import evaluate_set


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. Every rank has the same score; only rank 0 has results."""

    score: float  # the mean headline of the sets, in [0, 1]
    results: dict[str, Result]
    seconds: float

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """{set: {name: number}}, for metrics.jsonl."""
        return {name: result.metrics for name, result in self.results.items()}

    def describe(self, best_before: float | None) -> str:
        """A line for the log. best_before: the best score of earlier evaluations, if there were any."""
        sets = "  ".join(f"{name} {result.summary}" for name, result in self.results.items())
        best = ("the best so far" if best_before is None or self.score > best_before
                else f"best {100 * best_before:.2f}%")
        return f"{sets}  mean {100 * self.score:.2f}% ({best})  in {self.seconds:.1f} s"


class Evaluator:
    """Scores a backbone on evaluation sets without changing it.

    Args:
        sets: the evaluation sets; may be empty.
        freq: steps between evaluations; None leaves the time to the caller.
        batch_size: images that a rank embeds at a time.
        workers: image reading processes of this node, which its ranks share.
        mean_face: of the training images; rank 0 compares the sets with it, once.
    """

    def __init__(self, context: DistContext, sets: Sequence[EvalSet], *, freq: int | None, batch_size: int,
                 workers: int, mean_face: Tensor | None = None) -> None:
        self.sets, self._context, self._freq = sets, context, freq
        self._batch_size, self._workers, self._mean_face = batch_size, workers, mean_face

    def is_due(self, step: int) -> bool:
        """Whether `freq` asks for an evaluation after this step."""
        return bool(self.sets) and self._freq is not None and step % self._freq == 0

    def run(self, backbone: nn.Module, stop: StopSignal | None = None) -> Evaluation:
        """Collective. Embed and score all sets, with the buffers of rank 0: those that a checkpoint holds.

        stop: raise Dropped, on all ranks, after a stop signal and if an image cannot be read or the scoring fails.
        backbone: the bare module. DistributedDataParallel would synchronize in each forward pass, but ranks may differ
        in their number of batches.
        """
        started = time.perf_counter()
        results: dict[str, Result] = {}
        with buffers_of_rank_0(self._context, backbone):
            for eval_set in self.sets:
                result = evaluate_set(backbone, eval_set, self._context, batch_size=self._batch_size,
                                      workers=self._workers, progress=False, stop=stop,
                                      mean_face=self._mean_face)
                if result is not None:  # on rank 0
                    results[eval_set.name] = result
        self._mean_face = None  # the sets stay the same
        headlines = [result.headline for result in results.values()] or [0.0]
        score = torch.tensor(headlines, dtype=torch.float64, device=self._context.device).mean()
        dist.broadcast(score, src=0)
        return Evaluation(float(score), results, time.perf_counter() - started)
