"""What a run reports: metrics.jsonl, TensorBoard, a progress bar or lines. Rank 0 writes; all ranks average."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from utils.dist.collectives import all_gather_rows
from utils.dist.context import DistContext
from utils.files import move_aside
from utils.training.guard import ADVICE, NotFinite, nonfinite_step

METRICS_FILE = "metrics.jsonl"


# So many steps without a finite loss in a row are not a few bad batches: the weights are lost.
_MAX_NONFINITE_IN_A_ROW = 100


class TrainingLog:
    """Losses and accuracies, kept on the device until somebody reads them.

    Args:
        context: this process.
        output: directory of metrics.jsonl and tensorboard/.
        fresh: a new run, for which an older metrics.jsonl is put aside; else the run of the lines that are there goes on.
        step: steps already done; lines after it are removed.
        total_steps, epochs: for the bar, the ETA and the lines.
        global_batch: images per step, of all ranks.
        print_freq: steps between reports.
        skip_nonfinite: a step whose loss was inf or NaN was left out, and is counted. False: it ends the run.
    """

    def __init__(self, context: DistContext, output: str, *, fresh: bool, step: int, total_steps: int, epochs: int,
                 global_batch: int, print_freq: int, skip_nonfinite: bool = False) -> None:
        self._context, self._print_freq = context, print_freq
        self._total_steps, self._epochs, self._global_batch = total_steps, epochs, global_batch
        self._pending: list[dict] = []
        self._pending_values: list[Tensor] = []
        self._pending_nonfinite: list[Tensor] = []
        self._skip_nonfinite, self._skipped, self._skipped_in_a_row = skip_nonfinite, 0, 0
        self._hits: list[tuple[float, float]] = []  # top-1, top-5 of the steps since the last report
        self._first_step = self._window_step = step
        self._window_start = time.perf_counter()
        self._window_paused = 0.0
        self._bar = None
        if context.is_main:
            self._path = os.path.join(output, METRICS_FILE)
            move_aside(self._path) if fresh else _keep_lines_until(self._path, step)
            self._file = open(self._path, "a", encoding="utf-8")
            from torch.utils.tensorboard import SummaryWriter  # a second of start-up that only rank 0 needs

            self._tensorboard = SummaryWriter(os.path.join(output, "tensorboard"), purge_step=step + 1)
            if sys.stderr.isatty():
                self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def add(self, *, step: int, epoch: int, lr: float, loss: Tensor, num_closer: Tensor, finite: Tensor) -> None:
        """Collective every print_freq steps. All of this rank, on the device; step from 1.

        loss: scalar. num_closer: (M,). finite: bool scalar, whether the embeddings were.
        """
        hits = [(num_closer < k).double().mean() for k in (1, 5)]
        self._pending.append({"step": step, "epoch": epoch, "loss": None, "lr": lr})
        self._pending_values.append(torch.stack([loss.detach().double(), *hits]))
        self._pending_nonfinite.append(torch.stack([finite, loss.detach().isfinite()]).logical_not())
        if self._bar is not None:
            self._bar.update(1)
        if step % self._print_freq == 0:
            self.flush(report=True)

    def flush(self, report: bool = False) -> None:
        """Collective. Write the steps so far: the ranks' mean of each loss. Every rank's share of a global batch is equal.

        Raises NotFinite, on all ranks, for a loss that is inf or NaN: with skip_nonfinite for very many in a row only.
        """
        if not self._pending:
            return
        values = torch.stack(self._pending_values)
        dist.all_reduce(values)
        rows = (values / self._context.world_size).tolist()
        nonfinite = self._nonfinite_steps([loss for loss, _, _ in rows])
        for line, (loss, top1, top5) in zip(self._pending, rows):
            if math.isfinite(loss):
                line["loss"] = loss
                self._hits.append((top1, top5))
            else:
                line["nonfinite"] = True  # and "loss" stays null: JSON knows neither inf nor NaN
            self._skipped_in_a_row = 0 if math.isfinite(loss) else self._skipped_in_a_row + 1
        if self._skip_nonfinite:
            self._skipped += len(nonfinite)
            for text in nonfinite:
                self.say(f"left out {text}")
        if report:
            self._report(self._pending[-1])
        if self._context.is_main:
            for line in self._pending:
                self._file.write(json.dumps(line, allow_nan=False) + "\n")
                for name in line.keys() - {"step", "epoch", "nonfinite"}:
                    if line[name] is not None:
                        self._tensorboard.add_scalar(name, line[name], line["step"])
            self._file.flush()
        self._pending, self._pending_values, self._pending_nonfinite = [], [], []
        if nonfinite and not self._skip_nonfinite:
            raise NotFinite(f"{nonfinite[0]}; training stopped, no checkpoint was written over. To go on: {ADVICE}, "
                            "or leave such steps out with --on-nonfinite skip")
        if self._skipped_in_a_row >= _MAX_NONFINITE_IN_A_ROW:
            raise NotFinite(f"{nonfinite[-1]}, as it was {self._skipped_in_a_row} steps in a row: there is nothing left to train "
                            f"(--on-nonfinite skip); {ADVICE}")

    def _nonfinite_steps(self, losses: list[float]) -> list[str]:
        """Collective if a loss, the same on all ranks, is not finite. A line for each pending step of which that is true."""
        steps = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        if not steps:
            return []
        mine = torch.stack([self._pending_nonfinite[number] for number in steps]).to(torch.uint8)
        found = all_gather_rows(mine.unsqueeze(0), dist.group.WORLD).bool().tolist()
        return [nonfinite_step(self._pending[number]["step"], losses[number], [its[place] for its in found])
                for place, number in enumerate(steps)]

    def _report(self, line: dict) -> None:
        """Add the figures of the window since the last report to `line`, and show them."""
        now = time.perf_counter()
        seconds = now - self._window_start - self._window_paused
        steps = line["step"] - self._window_step
        line["top1"] = 100 * sum(top1 for top1, _ in self._hits) / max(len(self._hits), 1)
        line["top5"] = 100 * sum(top5 for _, top5 in self._hits) / max(len(self._hits), 1)
        line["images_per_second"] = steps * self._global_batch / seconds
        line["memory_mib"] = _peak_memory_mib(self._context.device)
        if self._skipped:
            line["skipped_steps"] = self._skipped
        remaining = (self._total_steps - line["step"]) * seconds / steps
        self._hits, self._window_step, self._window_start, self._window_paused = [], line["step"], now, 0.0
        if not self._context.is_main:
            return
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        figures = (f"loss {loss}  top1 {line['top1']:.1f}%  top5 {line['top5']:.1f}%  lr {line['lr']:.4g}  "
                   f"{line['images_per_second']:.1f} images/s  memory {line['memory_mib']:.0f} MiB"
                   + (f"  left out {self._skipped} steps" if self._skipped else ""))
        if self._bar is not None:
            self._bar.set_description(f"epoch {line['epoch'] + 1}/{self._epochs}", refresh=False)
            self._bar.set_postfix_str(figures)
        else:
            print(f"epoch {line['epoch'] + 1}/{self._epochs}  step {line['step']}/{self._total_steps}  {figures}  "
                  f"eta {_hours(remaining)}", flush=True)

    def add_evaluation(self, *, step: int, epoch: int, results: dict[str, dict[str, float]]) -> None:
        """Rank 0 only, after `flush`: a line of its own, {"step", "epoch", "val": {set: {name: number}}}."""
        self._file.write(json.dumps({"step": step, "epoch": epoch, "val": results}) + "\n")
        self._file.flush()
        for name, numbers in results.items():
            for kind, value in numbers.items():
                self._tensorboard.add_scalar(f"val/{name}/{kind}", value, step)

    def say(self, text: str) -> None:
        """Print a line on rank 0 without tearing the progress bar."""
        if self._context.is_main:
            tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def count_skipped(self, images: int) -> None:
        """Collective. Tell how many bad images all ranks have replaced since the last time, if any."""
        total = torch.tensor(images, device=self._context.device)
        dist.all_reduce(total)
        if total:
            self.say(f"replaced {int(total)} images that could not be decoded (--skip-bad-images)")

    def pause(self, seconds: float) -> None:
        """Leave `seconds` (of saving, say) out of the images per second."""
        self._window_paused += seconds

    def close(self) -> None:
        """Collective."""
        self.flush()
        if self._context.is_main:
            self._file.close()
            self._tensorboard.close()
            if self._bar is not None:
                self._bar.close()


def _keep_lines_until(path: str, step: int) -> None:
    """Make `path` ready to append the line of `step` + 1: later lines and a torn last one go."""
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file, open(path + ".part", "w", encoding="utf-8") as kept:
        for line in file:
            try:
                if json.loads(line)["step"] <= step and line.endswith("\n"):
                    kept.write(line)
            except (json.JSONDecodeError, TypeError, KeyError):
                continue
    os.replace(path + ".part", path)


def _peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process, MiB: the GPU's, or the resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def _hours(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
