"""What a run reports: metrics.jsonl, TensorBoard, and a progress bar or lines. Rank 0 writes; all ranks average.

metrics.jsonl has an object per step, {"step", "epoch", "loss", "lr"}. Where a report was due it also has "top1",
"top5", "images_per_second" and "memory_mib". A loss that is inf or NaN is written as null, with "nonfinite": true. An
evaluation is an object of its own, {"step", "epoch", "val": {set: {name: number}}}.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import math
import os
import resource
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from utils.dist.collectives import all_gather_rows
from utils.dist.context import DistContext
from utils.evaluation.curves import METRICS_FILE
from utils.files import LogFile, atomic_write, move_aside
from utils.training.guard import StepLoss

TENSORBOARD_DIRECTORY = "tensorboard"


class TrainingLog:
    """Collects losses and accuracies on the device, and reads and reports them every `print_freq` steps.

    Args:
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
        # For each step since the last flush its line, and float64 (6,): loss, top-1, top-5 in [0, 1], whether the
        # embeddings and the loss were inf or NaN, and whether the step was skipped.
        self._pending: list[tuple[dict[str, Any], Tensor]] = []
        self._skip_nonfinite, self._skipped = skip_nonfinite, 0
        self._hits: list[tuple[float, float]] = []  # top-1, top-5 of the steps since the last report
        self._window_step, self._window_start, self._window_paused = step, time.perf_counter(), 0.0
        self._bar: tqdm | None = None
        if context.is_main:
            path = os.path.join(output, METRICS_FILE)
            try:
                if fresh or not os.path.isfile(path):
                    move_aside(path)
                else:
                    _drop_lines_after(path, step)
            except OSError as error:
                self.say(f"warning: {path}: cannot be replaced ({error.strerror}); new lines are appended to it")
            self._file = LogFile(path, self.say)
            self._tensorboard = _TensorBoard(os.path.join(output, TENSORBOARD_DIRECTORY), step + 1, self.say)
            if sys.stderr.isatty():
                self._bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def add(self, *, step: int, epoch: int, lr: float, loss: Tensor, num_closer: Tensor,
            finite: Tensor, skipped: Tensor | None = None) -> list[StepLoss]:
        """Collective every `print_freq` steps. Record a step of this rank; steps count from 1.

        loss: scalar. num_closer: (n,), the classes closer to each embedding than its own. finite: bool scalar, whether
        the embeddings were. skipped: scalar, the same on all ranks, 1 if the optimizers left the step out. All stay on
        the device. Returns what `flush` does in a step that reports, else nothing.
        """
        loss = loss.detach()
        values = [loss, *((num_closer < k).double().mean() for k in (1, 5)), ~finite, ~loss.isfinite(),
                  torch.zeros_like(loss) if skipped is None else skipped]
        line: dict[str, Any] = {"step": step, "epoch": epoch, "loss": None, "lr": lr}
        self._pending.append((line, torch.stack([value.double() for value in values])))
        if self._bar is not None:
            self._bar.update(1)
        return self.flush(report=True) if step % self._print_freq == 0 else []

    def flush(self, report: bool = False) -> list[StepLoss]:
        """Collective. Write the pending steps and return their losses: means over the ranks, which have equal batches.

        Pass the return value to StepGuard.check, on every rank.
        """
        if not self._pending:
            return []
        values = all_gather_rows(torch.stack([values for _, values in self._pending]).unsqueeze(0), None)
        means, nonfinite = values[..., :3].mean(dim=0).tolist(), values[..., 3:5].bool()  # (W, steps, 2)
        skipped = values[0, :, 5].bool().tolist()
        steps = []
        for number, ((line, _), (loss, top1, top5)) in enumerate(zip(self._pending, means)):
            if math.isfinite(loss):
                line["loss"] = loss
                self._hits.append((top1, top5))
                steps.append(StepLoss(line["step"], loss, skipped=skipped[number]))
                self._skipped += skipped[number]
            else:
                line["nonfinite"] = True  # "loss" stays null, because JSON has no inf or NaN
                steps.append(StepLoss(line["step"], loss, nonfinite[:, number].tolist()))
                if self._skip_nonfinite:
                    self._skipped += 1
                    self.say(f"skipped {steps[-1].describe()}")
        lines = [line for line, _ in self._pending]
        self._pending = []
        if report:
            self._report(lines[-1])
        if self._context.is_main:
            self._file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())
            self._tensorboard.add(
                (line["step"], {name: value for name, value in line.items()
                                if name not in ("step", "epoch", "nonfinite") and value is not None}) for line in lines)
        return steps

    def _report(self, line: dict[str, Any]) -> None:
        """Add the figures since the last report to `line`, and show them."""
        now = time.perf_counter()
        seconds = now - self._window_start - self._window_paused
        steps = line["step"] - self._window_step
        for place, name in enumerate(("top1", "top5")):
            line[name] = 100 * sum(hits[place] for hits in self._hits) / max(len(self._hits), 1)
        line["images_per_second"] = steps * self._global_batch / seconds
        line["memory_mib"] = _peak_memory_mib(self._context.device)
        if self._skipped:
            line["skipped_steps"] = self._skipped
        remaining = datetime.timedelta(seconds=int((self._total_steps - line["step"]) * seconds / steps))
        self._hits, self._window_step, self._window_start, self._window_paused = [], line["step"], now, 0.0
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        figures = (f"loss {loss}  top1 {line['top1']:.1f}%  top5 {line['top5']:.1f}%  lr {line['lr']:.4g}  "
                   f"{line['images_per_second']:.1f} images/s  memory {line['memory_mib']:.0f} MiB"
                   + (f"  skipped {self._skipped} steps" if self._skipped else ""))
        epoch = f"epoch {line['epoch'] + 1}/{self._epochs}"
        if self._bar is not None:
            self._bar.set_description(epoch, refresh=False)
            self._bar.set_postfix_str(figures)
        else:
            self.say(f"{epoch}  step {line['step']}/{self._total_steps}  {figures}  eta {remaining}")

    def add_evaluation(self, *, step: int, epoch: int, metrics: dict[str, dict[str, float]]) -> None:
        """Write {set: {name: number}} as a line of its own, on rank 0. Call `flush` first."""
        if not self._context.is_main:
            return
        self._file.write(json.dumps({"step": step, "epoch": epoch, "val": metrics}).encode() + b"\n")
        self._tensorboard.add([(step, {f"val/{name}/{kind}": value for name, numbers in metrics.items()
                                       for kind, value in numbers.items()})])

    def say(self, text: str) -> None:
        """Print a line on rank 0, above the progress bar if there is one."""
        if self._context.is_main:
            tqdm.write(text) if self._bar is not None else print(text, flush=True)

    def count_replaced(self, images: int) -> None:
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


class _TensorBoard:
    """Scalars for TensorBoard. `first_step`: TensorBoard hides what an earlier file says from this step on.

    Not torch's SummaryWriter: it writes in a thread, which prints a traceback and ends the run on a full disk.
    """

    def __init__(self, directory: str, first_step: int, say: Callable[[str], None]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # slow to import, and only rank 0 needs them
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        self._file = LogFile(os.path.join(directory, name), say)
        buffer = io.BytesIO()
        self._records, self._buffer = RecordWriter(buffer), buffer
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        for event in {"file_version": "brain.Event:2"}, {"session_log": start, "step": first_step}:
            self._records.write(self._event(wall_time=time.time(), **event).SerializeToString())
        self.add(())

    def add(self, steps: Iterable[tuple[int, dict[str, float]]]) -> None:
        """Write (step, {name: value}) for each step."""
        for step, scalars in steps:
            # A name may hold bytes of a file name that are no text.
            values = [self._summary.Value(tag=name.encode(errors="backslashreplace").decode(), simple_value=value)
                      for name, value in scalars.items()]
            event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
            self._records.write(event.SerializeToString())
        self._file.write(self._buffer.getvalue())
        self._buffer.seek(0)
        self._buffer.truncate()

    def close(self) -> None:
        self._file.close()


def _drop_lines_after(path: str, step: int) -> None:
    """Remove the lines of later steps and damaged ones, so that the line of `step` + 1 can be appended."""
    with open(path, "rb") as file, atomic_write(path) as shortened:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # not a line of ours, or torn
                if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                    shortened.write(line)


def _peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: of the GPU, or the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
