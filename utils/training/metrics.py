"""What a run reports: metrics.jsonl, TensorBoard, and a progress bar or lines. Rank 0 writes; all ranks average.

metrics.jsonl has an object per step, {"step", "epoch", "loss", "lr"}. Where a report was due it also has "top1",
"top5", "images_per_second" and "memory_mib". A loss that is inf or NaN is written as null, with "nonfinite": true. An
evaluation is an object of its own, {"step", "epoch", "val": {set: {name: number}}}.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from utils.dist.collectives import all_gather_rows
from utils.dist.context import DistContext
from utils.files import atomic_write, move_aside
from utils.training.guard import StepLoss

METRICS_FILE = "metrics.jsonl"


class TrainingLog:
    """Collects losses and accuracies on the device, and reads and reports them every `print_freq` steps.

    Args:
        context: this process.
        output: directory of metrics.jsonl and tensorboard/.
        fresh: a new run, which moves an older metrics.jsonl aside. False: continue the file that is there.
        step: steps done before; later lines are removed.
        total_steps, epochs: for the bar, the ETA and the lines.
        global_batch: images per step, over all ranks.
        print_freq: steps between reports.
        skip_nonfinite: steps with a loss that is inf or NaN are skipped, and are reported as such.
    """

    def __init__(self, context: DistContext, output: str, *, fresh: bool, step: int, total_steps: int, epochs: int,
                 global_batch: int, print_freq: int, skip_nonfinite: bool = False) -> None:
        self._context, self._print_freq = context, print_freq
        self._total_steps, self._epochs, self._global_batch = total_steps, epochs, global_batch
        self._pending: list[dict[str, Any]] = []  # a line per step since the last flush, in step with the next two
        self._pending_values: list[Tensor] = []  # (3,): loss, top-1, top-5
        self._pending_nonfinite: list[Tensor] = []  # bool (2,): embeddings, loss
        self._skip_nonfinite, self._skipped = skip_nonfinite, 0
        self._hits: list[tuple[float, float]] = []  # top-1, top-5 of the steps since the last report
        self._window_step, self._window_start, self._window_paused = step, time.perf_counter(), 0.0
        self._bar: tqdm | None = None
        if context.is_main:
            path = os.path.join(output, METRICS_FILE)
            move_aside(path) if fresh else _drop_lines_after(path, step)
            self._file = open(path, "a", encoding="utf-8")
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import, which only rank 0 needs

            self._tensorboard = SummaryWriter(os.path.join(output, "tensorboard"), purge_step=step + 1)
            if sys.stderr.isatty():
                self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def add(
        self, *, step: int, epoch: int, lr: float, loss: Tensor, num_closer: Tensor, finite: Tensor
    ) -> list[StepLoss]:
        """Collective every `print_freq` steps. Record a step of this rank; steps count from 1.

        loss: scalar. num_closer: (n,), the classes closer to each embedding than its own. finite: bool scalar, whether
        the embeddings were. All stay on the device. Returns what `flush` does in a step that reports, else nothing.
        """
        hits = [(num_closer < k).double().mean() for k in (1, 5)]
        self._pending.append({"step": step, "epoch": epoch, "loss": None, "lr": lr})
        self._pending_values.append(torch.stack([loss.detach().double(), *hits]))
        self._pending_nonfinite.append(torch.stack([finite, loss.detach().isfinite()]).logical_not())
        if self._bar is not None:
            self._bar.update(1)
        return self.flush(report=True) if step % self._print_freq == 0 else []

    def flush(self, report: bool = False) -> list[StepLoss]:
        """Collective. Write the pending steps and return their losses: means over the ranks, which have equal batches.

        Pass the return value to StepGuard.check, on every rank.
        """
        if not self._pending:
            return []
        values = torch.stack(self._pending_values)
        dist.all_reduce(values)
        rows = (values / self._context.world_size).tolist()
        steps = self._with_nonfinite_ranks([
            StepLoss(line["step"], loss) for line, (loss, _, _) in zip(self._pending, rows)])
        for line, step, (loss, top1, top5) in zip(self._pending, steps, rows):
            if math.isfinite(loss):
                line["loss"] = loss
                self._hits.append((top1, top5))
            else:
                line["nonfinite"] = True  # "loss" stays null, because JSON has no inf or NaN
                if self._skip_nonfinite:
                    self._skipped += 1
                    self.say(f"skipped {step.describe()}")
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
        return steps

    def _with_nonfinite_ranks(self, steps: list[StepLoss]) -> list[StepLoss]:
        """Collective if a loss is not finite; all ranks have the same losses. Fill in `nonfinite` of those steps."""
        places = [place for place, step in enumerate(steps) if not math.isfinite(step.loss)]
        if places:
            flags = torch.stack([self._pending_nonfinite[place] for place in places]).to(torch.uint8)
            assert dist.group.WORLD is not None
            ranks = all_gather_rows(flags.unsqueeze(0), dist.group.WORLD).bool().tolist()  # (W, steps, 2)
            for number, place in enumerate(places):
                step = steps[place]
                steps[place] = StepLoss(step.step, step.loss, [(rank[number][0], rank[number][1]) for rank in ranks])
        return steps

    def _report(self, line: dict[str, Any]) -> None:
        """Add the figures since the last report to `line`, and show them."""
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
                   + (f"  skipped {self._skipped} steps" if self._skipped else ""))
        if self._bar is not None:
            self._bar.set_description(f"epoch {line['epoch'] + 1}/{self._epochs}", refresh=False)
            self._bar.set_postfix_str(figures)
        else:
            print(f"epoch {line['epoch'] + 1}/{self._epochs}  step {line['step']}/{self._total_steps}  {figures}  "
                  f"eta {_hours(remaining)}", flush=True)

    def add_evaluation(self, *, step: int, epoch: int, metrics: dict[str, dict[str, float]]) -> None:
        """Write {set: {name: number}} as a line of its own, on rank 0. Call `flush` first."""
        if not self._context.is_main:
            return
        self._file.write(json.dumps({"step": step, "epoch": epoch, "val": metrics}) + "\n")
        self._file.flush()
        for name, numbers in metrics.items():
            for kind, value in numbers.items():
                self._tensorboard.add_scalar(f"val/{name}/{kind}", value, step)

    def say(self, text: str) -> None:
        """Print a line on rank 0, above the progress bar if there is one."""
        if self._context.is_main:
            tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def count_skipped(self, images: int) -> None:
        """Collective. Report how many bad images all ranks have replaced since the last call, if any."""
        total = torch.tensor(images, device=self._context.device)
        dist.all_reduce(total)
        if total:
            self.say(f"replaced {int(total)} images that could not be decoded (--skip-bad-images)")

    def pause(self, seconds: float) -> None:
        """Exclude `seconds`, of saving or evaluating, from the images per second."""
        self._window_paused += seconds

    def close(self) -> None:
        """Close the files. Call `flush` first."""
        if self._context.is_main:
            self._file.close()
            self._tensorboard.close()
            if self._bar is not None:
                self._bar.close()


def _drop_lines_after(path: str, step: int) -> None:
    """Remove the lines of later steps and an incomplete last line, so that the line of `step` + 1 can be appended."""
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as file, atomic_write(path) as shortened:
        for line in file:
            try:
                if json.loads(line)["step"] <= step and line.endswith("\n"):
                    shortened.write(line.encode())
            except (json.JSONDecodeError, TypeError, KeyError):
                continue


def _peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: of the GPU, or the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def _hours(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
