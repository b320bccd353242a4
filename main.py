#!/usr/bin/env python3
"""Train a face recognition backbone with a margin softmax whose class centers can be sharded over all processes.

Reads from top to bottom: options -> checks -> launch -> train -> train_one_epoch -> the parts of a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import secrets
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until training begins, Ctrl-C ends the program at once, without a traceback of the imports below.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if __name__ == "__main__":
    from utils.packages import PACKAGES, require_packages

    require_packages([*PACKAGES, "tensorboard"])

import torch
from torch.nn.parallel import DistributedDataParallel

from data.augment import prepare_batch
from data.loader import DeviceBatches, GlobalBatchSampler, NoBatch, TrainBatch, build_train_loader
from data.training_set import TrainingSet
from models.randomness import image_keys
from utils import preflight
from utils.build import Unaveraged, build_training
from utils.checkpoint.init_from import check_init_from, init_from
from utils.checkpoint.layout import move_older_run_aside
from utils.checkpoint.reader import AUTO, EMA, Checkpoint, Resume, find_checkpoint, load_checkpoint, read_resumable
from utils.checkpoint.weights import open_weights
from utils.checkpoint.writer import KEEP, CheckpointWriter
from utils.dist.collectives import broadcast_integer, require_same_on_all_ranks
from utils.dist.context import DistContext, seed_random_numbers, set_matmul
from utils.dist.stop import Dropped, StopSignal
from utils.errors import exit_on_user_error
from utils.evaluation.mean_face import sample_mean_face
from utils.evaluation.protocol import EvalSet
from utils.evaluation.sets import Source, evaluate_set, open_sets
from utils.files import OutputLock, lock_output
from utils.launch.plan import ProcessPlan, is_first_process, plan_processes, warn_of_unused_environment
from utils.launch.spawn import launch
from utils.memory import explain_out_of_memory
from utils.options import Options, describe_changes, parse_options
from utils.signals import EXIT_SAVED
from utils.training.evaluator import Evaluator
from utils.training.guard import NotFinite, StepGuard, require_finite_weights
from utils.training.metrics import TrainingLog
from utils.training.schedules import learning_rate
from utils.training.state import TrainState


def main() -> None:
    options = parse_options()
    plan = plan_processes(options)
    warn_of_unused_environment(plan)
    if options.evaluate:
        if is_first_process():
            evaluate(options, plan)
        return
    preflight.check_batch(options, plan)
    preflight.check_classifier(options, plan)
    preflight.check_fused_update(options, plan)
    preflight.check_sampling(options, plan)
    preflight.check_shared_memory(options, plan)
    # Only to check them here: every rank reads the files itself. Node 0 chooses the checkpoint; others may not see it.
    decides = plan.node_rank == 0
    resumed = read_resumable(resume_request(options)) if options.resume and decides else None
    if options.init_from and resumed is None and (decides or not options.resume):
        check_init_from(options.init_from, options.training_arch, options.embedding_size, options.sub_centers,
                        options.channel_order)
    preflight.check_sync_bn(options)
    preflight.check_freeze(options, fresh=decides and resumed is None)
    sets = preflight.open_validation_sets(options)
    dataset = preflight.open_dataset(options, plan)
    options = preflight.count_classes(options, dataset, resumed)
    memory = preflight.check_memory(options, plan)
    if is_first_process():
        print(preflight.run_table(options, plan, dataset, sets, resumed), f"memory         {memory}", sep="\n",
              flush=True)
    del resumed  # its tensors are mapped from a file
    if options.plan:
        return
    lock = None
    if plan.node_rank == 0:  # the home of checkpoints and metrics, whether other nodes see it or not
        preflight.make_output(options)
        # Held until the last process that received it ends.
        lock = lock_output(options.output) if is_first_process() else None
    if plan.nodes > 1:
        print(f"node {plan.node_rank} of {plan.nodes}: meeting the other nodes at {plan.url}", flush=True)
    sys.exit(launch(train, plan, options, dataset, sets, lock))


@dataclass
class Run:
    """One rank's part of a training run."""

    context: DistContext
    options: Options
    state: TrainState
    model: DistributedDataParallel | Unaveraged
    steps_per_epoch: int
    log: TrainingLog
    guard: StepGuard
    writer: CheckpointWriter | None = None
    evaluator: Evaluator | None = None
    stop: StopSignal | None = None
    saved_step: int | None = None  # of the last save
    failed_evaluations: int = 0


def train(
    context: DistContext,
    options: Options,
    dataset: TrainingSet,
    sets: Sequence[EvalSet] = (),
    lock: OutputLock | None = None,
) -> int:
    """Collective: every rank runs this. Returns the exit status, 0 unless a signal stopped the run.

    sets: what the backbone is evaluated on. lock: kept, so that the directory stays locked.
    """
    with explain_out_of_memory(preflight.memory_remedies(options, context.world_size)):
        return run_training(context, options, dataset, sets)


def run_training(
    context: DistContext, options: Options, dataset: TrainingSet, sets: Sequence[EvalSet]
) -> int:
    """Collective. `train`, without its explanation of an allocation that fails."""
    require_same_on_all_ranks(context, preflight.shared_facts(options, dataset, sets))
    checkpoint = find_checkpoint(resume_request(options), dataset.identities, context) if options.resume else None
    seed = checkpoint.contents["seed"] if checkpoint else choose_seed(options, context)
    global_batch = options.batch_size * context.nodes
    state, model = build_training(context, options, seed, len(dataset), global_batch, dataset.identities,
                                  dataset.fingerprint())
    if context.is_main:  # which evaluates and writes it
        state = dataclasses.replace(state, mean_face=sample_mean_face(dataset))
    sampler = GlobalBatchSampler(
        len(dataset), global_batch, options.accumulation_steps, context.rank, context.world_size, seed
    )
    steps_per_epoch = sampler.steps_per_epoch
    origin = set_starting_point(state, options, checkpoint, steps_per_epoch)
    position, fresh = state.position, checkpoint is None
    # With --resume PATH, the run in --output may be another one than that of the checkpoint.
    starts_here = checkpoint is None or options.resume != AUTO and not checkpoint.is_of_run_in(options.output)
    del checkpoint  # its tensors are mapped from a file that a later save may remove
    if starts_here and context.is_main and (
            aside := move_older_run_aside(options.output, checkpoints=not options.no_save)):
        print(f"an older run was in {options.output}: moved to {aside}", flush=True)
    end = position.step - position.step_in_epoch + (options.epochs - position.epoch) * steps_per_epoch
    last_step = end if options.max_steps is None else min(end, options.max_steps)

    log = TrainingLog(context, options.output, fresh=fresh, step=position.step, total_steps=last_step,
                      epochs=options.epochs, global_batch=global_batch, print_freq=options.print_freq,
                      skip_nonfinite=options.on_nonfinite == "skip")
    log.say(f"seed {seed}{origin}")
    writer = CheckpointWriter(context, options.output, options=dataclasses.asdict(options), say=log.say,
                              keep=options.keep or KEEP, save_freq=options.save_freq, enabled=not options.no_save)
    per_rank = options.batch_size // context.processes_per_node // options.accumulation_steps
    evaluator = Evaluator(context, sets, freq=options.val_freq, batch_size=max(per_rank, 32), workers=options.workers,
                          mean_face=state.mean_face)
    stop = StopSignal(context.world_size, timeout=options.dist_timeout)
    guard = StepGuard(state.backbone, skip=options.on_nonfinite == "skip")
    run = Run(context, options, state, model, steps_per_epoch, log, guard, writer, evaluator, stop)
    loader = build_train_loader(dataset, sampler, workers=-(-options.workers // context.processes_per_node),
                                pin_memory=context.device.type == "cuda", stopping=lambda: stop.requested,
                                patience=stop.patience)
    stopped_by, first_step = None, position.step
    try:
        if position.to_evaluate and evaluator.sets:  # the run that saved this checkpoint did not live to evaluate it
            save(run, to_evaluate=True)
            stopped_by = evaluate_backbone(run)
        while position.step < last_step and not stopped_by:
            sampler.set_position(position.epoch, position.step_in_epoch)
            steps = min(steps_per_epoch - position.step_in_epoch, last_step - position.step)
            stopped_by = train_one_epoch(run, loader, steps)
            if position.step_in_epoch == steps_per_epoch:
                position.epoch, position.step_in_epoch = position.epoch + 1, 0
            due = bool(evaluator.sets) and (position.step == last_step or evaluator.is_due(position.step)
                                            or options.val_freq is None and position.step_in_epoch == 0)
            save(run, to_evaluate=due)
            # After a signal there may be little time left. The run that is resumed evaluates.
            if due and not stopped_by:
                stopped_by = evaluate_backbone(run)
    except NoBatch as error:
        # Other ranks are already in the next step, and earlier micro-batches have changed BatchNorm's statistics.
        if context.world_size > 1 or options.accumulation_steps > 1:
            raise
        if position.step > first_step:
            save(run)
            writer.wait()
        stopped_by = stop.poll()
        if not stopped_by:
            raise
        log.say(f"warning: {error}")
    except NotFinite:  # raised on all ranks together; the save in progress is of an earlier, finite step
        writer.wait()
        raise
    log.close()
    saved = writer.close()
    stop.close()
    if run.failed_evaluations:
        saved += f"; warning: {run.failed_evaluations} evaluations failed"
    if stopped_by and (position.step < last_step or position.to_evaluate):
        log.say(f"stopped by {stopped_by.name} after step {position.step}; {saved}"
                + ("" if options.no_save else f"; rerun with --resume {AUTO} to continue"))
        return 128 + stopped_by if options.no_save else EXIT_SAVED
    log.say(f"done: {position.step} steps; {saved}")
    return 0


def train_one_epoch(run: Run, batches: Iterable[TrainBatch], steps: int) -> signal.Signals | None:
    """Collective. Train the next `steps` steps of an epoch; returns the signal that ended it early, if any.

    Between the steps it saves and evaluates where that is due; after the last one the caller does both.
    """
    options, state, position = run.options, run.state, run.state.position
    micro_batches, dtype = options.accumulation_steps, getattr(torch, options.precision)
    total_steps, replaced_images, stopped_by = options.epochs * run.steps_per_epoch, 0, None
    run.model.train()
    batches = iter(DeviceBatches(batches, run.context.device))
    for steps_left in reversed(range(steps)):
        # Not position.step: the schedule counts epochs, whose number of steps changes with the training set.
        step_number = position.epoch * run.steps_per_epoch + position.step_in_epoch
        lr = learning_rate(step_number, run.steps_per_epoch, total_steps, options)
        state.optimizers.set_learning_rate(lr)
        losses, closer, finite = [], [], []
        run.guard.snapshot()
        state.classifier.start_step(position.step)
        for number, (images, labels, indices, skipped) in enumerate(itertools.islice(batches, micro_batches)):
            images = prepare_batch(images, dtype, augment=options.augment, seed=state.seed, epoch=position.epoch,
                                   indices=indices, channels_last=options.channels_last)
            keys = image_keys(state.seed, position.step, indices).to(images.device, non_blocking=True)
            seed_random_numbers(state.seed, position.step * micro_batches + number, run.context)
            with contextlib.nullcontext() if number == micro_batches - 1 else run.model.no_sync():
                loss, num_closer, embeddings_finite = run.model(images, labels, keys)
                state.scaler.scale(loss / micro_batches).backward()
            losses.append(loss.detach())
            closer.append(num_closer)
            finite.append(embeddings_finite)
            replaced_images += skipped
        nonfinite = run.guard.nonfinite(losses)
        skipped_step = state.scaler.step_all(state.optimizers.all, nonfinite, state.clip)
        state.classifier.end_step(skipped_step)
        run.guard.rollback(nonfinite)
        if state.ema is not None:
            state.ema.update(skipped_step)
        state.optimizers.zero_grad()
        position.step, position.step_in_epoch = position.step + 1, position.step_in_epoch + 1
        run.guard.check(run.log.add(step=position.step, epoch=position.epoch, lr=lr, loss=torch.stack(losses).mean(),
                                    num_closer=torch.cat(closer), finite=torch.stack(finite).all(),
                                    skipped=skipped_step))
        stopped_by = run.stop.poll() if run.stop is not None else None
        if stopped_by:
            break
        if steps_left:
            due = run.evaluator is not None and run.evaluator.is_due(position.step)
            if run.writer is not None and (due or run.writer.is_due(position.step)):
                save(run, to_evaluate=due)
            if due and (stopped_by := evaluate_backbone(run)):
                break
    run.log.count_replaced(replaced_images)
    return stopped_by


def save(run: Run, *, to_evaluate: bool = False) -> None:
    """Collective. Save a checkpoint. Raises NotFinite, on all ranks, if a loss or a weight is not finite.

    to_evaluate: an evaluation follows. If the run does not live to finish it, the run that is resumed makes it.
    """
    assert run.writer is not None
    if run.saved_step == run.state.position.step:  # before an evaluation that was dropped
        return
    run.saved_step, run.state.position.to_evaluate = run.state.position.step, to_evaluate
    run.guard.check(run.log.flush())  # also because metrics.jsonl must hold every step that a checkpoint holds
    require_finite_weights(run.state.backbone, run.state.classifier.weight, run.state.position.step)
    run.log.pause(run.writer.save(run.state))


def evaluate_backbone(run: Run) -> signal.Signals | None:
    """Collective. Evaluate what was just saved, and link it if it is the best. Returns the signal that ended this.

    An evaluation that fails is a warning: it costs no training.
    """
    assert run.evaluator is not None and run.writer is not None
    position, started = run.state.position, time.perf_counter()
    try:
        averaged = run.state.ema.in_place() if run.state.ema is not None else contextlib.nullcontext()
        # torch.compile would compile the network again, for evaluation mode and other batches: minutes.
        eager = torch.compiler.set_stance("force_eager") if run.options.compile else contextlib.nullcontext()
        with averaged, eager:
            evaluation = run.evaluator.run(run.state.backbone, run.stop)
    except Dropped as dropped:
        run.log.pause(time.perf_counter() - started)
        if not dropped.signal:
            run.failed_evaluations += 1
            position.to_evaluate = False
            run.log.say(f"warning: the evaluation at step {position.step} failed ({dropped}); training continues")
        return dropped.signal
    epoch = position.epoch - (position.step_in_epoch == 0)  # of the last step: the position may be at the next epoch
    run.log.add_evaluation(step=position.step, epoch=epoch, metrics=evaluation.metrics)
    run.log.say(f"validation at step {position.step}: {evaluation.describe(position.best_score)}")
    is_best = position.best_score is None or evaluation.score > position.best_score
    best_score = evaluation.score if is_best or position.best_score is None else position.best_score
    if run.writer.note_evaluation(evaluation.score, best_score, is_best=is_best):
        position.best_score = best_score
    position.to_evaluate = False
    run.log.pause(time.perf_counter() - started)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a run


def set_starting_point(
    state: TrainState, options: Options, checkpoint: Checkpoint | None, steps_per_epoch: int
) -> str:
    """Collective. Load what the run starts from: a checkpoint, other weights or nothing. Returns a note for the log."""
    position = state.position
    if checkpoint is not None:
        load_checkpoint(state, checkpoint)
        saved = checkpoint.contents
        if any(tuple(saved["options"].get(name, ())) != getattr(options, name) for name in ("val_pairs", "val_bin")):
            position.best_score = None  # scores on different sets do not compare
        note = f", resuming {checkpoint.path} at step {position.step}"
        if changes := describe_changes(saved["options"], options):
            note += f"; changed since: {changes}"
        if state.ema is not None and EMA not in saved:
            note += "; --ema starts from these weights"
        if saved["position"]["step_in_epoch"] and not state.has_same_images(saved["sampler"]):
            what = ("the number of training images changed" if saved["sampler"]["num_images"] != state.num_images
                    else "training images were renamed, replaced or relabelled")
            note += f"; {what}, so epoch {position.epoch + 1} starts again"
        return note
    if options.start_epoch:
        position.epoch, position.step = options.start_epoch, options.start_epoch * steps_per_epoch
    if options.init_from:
        note = init_from(options.init_from, state.arch, state.backbone, state.classifier, state.identities,
                         options.channel_order)
        if state.ema is not None:
            state.ema.restart()
        return ", " + note
    return ""


def choose_seed(options: Options, context: DistContext) -> int:
    """Collective. --seed, or a number that rank 0 draws for all ranks."""
    if options.seed is not None:
        return options.seed
    return broadcast_integer(secrets.randbits(31), context.device)


def resume_request(options: Options) -> Resume:
    return Resume(options.resume, options.output, arch=options.training_arch, num_classes=options.num_classes or None,
                  embedding_size=options.embedding_size, loss=options.loss, sub_centers=options.sub_centers,
                  optimizer=options.optimizer, seed=options.seed, timeout=options.dist_timeout)


def evaluate(options: Options, plan: ProcessPlan) -> None:
    """--evaluate: score the model of --resume on --pair-list, in this process."""
    weights = open_weights(options.resume, options.arch, channel_order=options.channel_order)
    assert options.pair_list is not None
    (pairs,) = open_sets([Source("pairs", options.pair_list, "--pair-list", options.imgs_root,
                                 options.skip_missing_pairs)])
    print(f"{weights.describe(options.resume)}, {pairs.size} of {pairs.source}", flush=True)
    context = DistContext(rank=0, world_size=1, processes_per_node=1, device=plan.device)
    set_matmul(plan.matmul)
    result = evaluate_set(weights.backbone, pairs, context, batch_size=options.batch_size, workers=options.workers,
                          print_freq=options.print_freq, mean_face=weights.mean_face)
    assert result is not None
    print(result.report)


if __name__ == "__main__":
    exit_on_user_error(main)
