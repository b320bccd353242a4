#!/usr/bin/env python3
"""Train a face recognition backbone with an ArcFace classifier whose class centers are sharded over all processes.

Reads from top to bottom: parse and check -> spawn one process per GPU -> train -> train_one_epoch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until training begins Ctrl-C ends the program at once, without a traceback of the imports that follow, say.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data.augment import prepare_batch
from data.folder import FaceFolder
from data.loader import DeviceBatches, GlobalBatchSampler, build_train_loader
from data.recordio import RecordIODataset, is_recordio, require_no_package
from losses.fused import margin_softmax
from losses.softmax import margin_softmax_torchshard
from models import build_backbone, check_arch
from models.classifier import ArcFaceClassifier, automatic_memory_mib
from models.sync_batchnorm import convert_sync_batchnorm
from utils.checkpoint.initial import check_initial, start_from
from utils.checkpoint.layout import BEST, LATEST
from utils.checkpoint.reader import find_checkpoint, load_checkpoint, read_resumable, require_same_identities
from utils.checkpoint.weights import load_backbone
from utils.checkpoint.writer import CheckpointWriter
from utils.dist.collectives import broadcast_integer, require_same_on_all_ranks
from utils.dist.context import DistContext, seed_random_numbers
from utils.dist.ddp import fix_gradient_buckets
from utils.dist.sharding import ClassShard, init_model_parallel, let_ddp_ignore_shards
from utils.dist.stop import StopSignal
from utils.errors import UserError, exit_on_user_error
from utils.evaluation.protocol import EvalSet
from utils.evaluation.sets import Source, check_images, evaluate_set, open_sets
from utils.files import OutputLock, lock_output
from utils.launch.fingerprint import program_fingerprint
from utils.launch.plan import ProcessPlan, is_first_process, plan_processes
from utils.launch.spawn import launch
from utils.options import AUTO, EMBEDDING_SIZE, Options, parse_options
from utils.signals import EXIT_SAVED
from utils.training.evaluator import Evaluator
from utils.training.guard import NotFinite, StepGuard, require_finite_weights
from utils.training.metrics import TrainingLog
from utils.training.optim import Optimizers
from utils.training.scaler import SharedGradScaler, amp_dtype
from utils.training.schedules import learning_rate
from utils.training.state import Position, TrainState

TrainingImages = FaceFolder | RecordIODataset


class TrainingModel(nn.Module):
    """Images and labels -> loss: what DistributedDataParallel wraps. Mixed precision covers the backbone only."""

    def __init__(self, backbone: nn.Module, classifier: ArcFaceClassifier, autocast_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.backbone, self.classifier, self.autocast_dtype = backbone, classifier, autocast_dtype

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images (n, 3, 112, 112), labels (n,) -> (loss, num_closer, finite): see ArcFaceClassifier.

        finite: bool scalar, whether all of this rank's embeddings are: what tells the rank of a loss that is not.
        """
        with torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            embedding = self.backbone(images)
        return *self.classifier(embedding, labels), embedding.detach().isfinite().all()


def main() -> None:
    options = parse_options()
    plan = plan_processes(options)
    if options.evaluate:
        if is_first_process():
            evaluate(options, plan)
        return
    check_arch(options.training_arch)
    check_batch(options, plan)
    check_fused_update(options, plan)
    # Both only to check them: every process reads for itself.
    goes_on = bool(options.resume) and read_resumable(options) is not None
    if options.init_from and not goes_on:
        check_initial(options.init_from, options.training_arch, EMBEDDING_SIZE)
    sets = open_validation_sets(options)
    dataset = open_dataset(options, plan)
    table = run_table(options, plan, dataset, sets)
    if is_first_process():
        print(table, flush=True)
    if options.plan:
        return
    make_output(options)
    # One lock for all nodes, which share the directory. It lives as long as any process that it is passed on to.
    lock = lock_output(options.output) if plan.node_rank == 0 and is_first_process() else None
    if plan.nodes > 1:
        print(f"node {plan.node_rank} of {plan.nodes}: meeting the others at {plan.url}", flush=True)
    sys.exit(launch(train, plan, options, dataset, sets, lock))


def train(
    context: DistContext,
    options: Options,
    dataset: TrainingImages,
    sets: Sequence[EvalSet] = (),
    lock: OutputLock | None = None,
) -> int:
    """Runs in every process, all of them together. `sets`: what to evaluate the backbone on. `lock`, of --output,
    is only to be held.

    Returns the exit status: not 0 if a signal stopped it.
    """
    require_same_on_all_ranks(context, shared_facts(options, dataset, sets))
    checkpoint = find_checkpoint(options, context)
    if checkpoint:
        require_same_identities(checkpoint, dataset.identities, options.resume)
    global_batch = options.batch_size * context.nodes
    seed = checkpoint.contents["seed"] if checkpoint else choose_seed(options, context)
    state, model = build_training(context, options, seed, len(dataset), global_batch, dataset.identities)
    sampler = GlobalBatchSampler(
        len(dataset), global_batch, options.accumulation_steps, context.rank, context.world_size, seed
    )
    position, steps_per_epoch = state.position, sampler.steps_per_epoch
    origin = ""
    if checkpoint:
        its = checkpoint.contents["options"]  # which loading clears
        other_sets = any(tuple(its.get(name, ())) != getattr(options, name) for name in ("val_pairs", "val_bin"))
        restarts_epoch = checkpoint.contents["position"]["step_in_epoch"] and checkpoint.contents["sampler"]["num_images"] != len(dataset)
        load_checkpoint(state, checkpoint, options)
        if other_sets:
            position.best_score = None  # accuracies on other sets do not compare
        origin = f", going on from {checkpoint.path} at step {position.step}"
        if restarts_epoch:
            origin += f"; the training set has other images than then: epoch {position.epoch + 1} begins again"
    elif options.init_from:
        origin = ", " + start_from(options.init_from, options.training_arch, state.backbone, state.classifier, dataset.identities)
    if options.start_epoch and not checkpoint:
        position.epoch, position.step = options.start_epoch, options.start_epoch * steps_per_epoch
    last_step = min(position.step - position.step_in_epoch + (options.epochs - position.epoch) * steps_per_epoch,
                    options.max_steps or float("inf"))
    loader = build_train_loader(
        dataset, sampler, workers=-(-options.workers // context.processes_per_node),
        pin_memory=context.device.type == "cuda",
    )
    log = TrainingLog(context, options.output, fresh=checkpoint is None, step=position.step, total_steps=last_step, epochs=options.epochs,
                      global_batch=global_batch, print_freq=options.print_freq,
                      skip_nonfinite=options.on_nonfinite == "skip")
    log.say(f"seed {seed}{origin}")
    writer = CheckpointWriter(options, context, log.say, fresh=checkpoint is None)

    evaluator = Evaluator(context, sets, freq=options.val_freq, workers=options.workers, batch_size=max(
        options.batch_size // context.processes_per_node // options.accumulation_steps, 32))
    guard = StepGuard(state.backbone, skip=options.on_nonfinite == "skip")
    stop, stopped_by = StopSignal(context.world_size, timeout=options.dist_timeout), None
    try:
        while position.step < last_step and not stopped_by:
            sampler.set_position(position.epoch, position.step_in_epoch)
            steps = min(steps_per_epoch - position.step_in_epoch, last_step - position.step)
            stopped_by = train_one_epoch(context, options, state, model, loader, steps, steps_per_epoch, log, writer, evaluator, stop, guard)
            if position.step_in_epoch == steps_per_epoch:
                position.epoch, position.step_in_epoch = position.epoch + 1, 0
            # After a signal there may be little time left: what counts then is that the checkpoint gets written.
            due = position.step == last_step or not stopped_by and (options.val_freq is None or evaluator.is_due(position.step))
            save(state, log, guard, writer, is_best=due and evaluate_and_note(state, log, guard, evaluator))
    except NotFinite:  # on all ranks: what is being saved just now is from before, and good
        writer.wait()
        raise
    stop.close()
    log.close()
    saved = writer.close()
    if position.step < last_step:
        log.say(f"stopped by {stopped_by.name} after step {position.step}; {saved}"
                + ("" if options.no_save else f"; the same command with --resume {AUTO} goes on"))
        return 128 + stopped_by if options.no_save else EXIT_SAVED
    log.say(f"done: {position.step} steps; {saved}")
    return 0


def save(state: TrainState, log: TrainingLog, guard: StepGuard, writer: CheckpointWriter, *, is_best: bool) -> None:
    """Collective. Losses and weights are looked at first: what is not finite is never saved. Raises NotFinite on all ranks."""
    guard.check(log.flush())  # before the checkpoint also because metrics.jsonl must know the steps that a checkpoint has
    require_finite_weights(state.backbone, state.classifier.weight, state.position.step)
    log.pause(writer.save(state, is_best=is_best))


def train_one_epoch(
    context: DistContext,
    options: Options,
    state: TrainState,
    model: DistributedDataParallel,
    loader: DataLoader,
    steps: int,
    steps_per_epoch: int,
    log: TrainingLog,
    writer: CheckpointWriter | None = None,
    evaluator: Evaluator | None = None,
    stop: StopSignal | None = None,
    guard: StepGuard | None = None,
) -> signal.Signals | None:
    """Collective. The next `steps` steps of the epoch that the loader's sampler stands in, or up to the signal returned.

    Between them `stop` tells of signals, `evaluator` looks at the backbone and `writer` saves.
    """
    model.train()
    dtype = getattr(torch, options.precision)
    position, optimizers, micro_batches = state.position, state.optimizers, options.accumulation_steps
    skipped_images, stopped_by = 0, None
    guard = guard or StepGuard(state.backbone, skip=options.on_nonfinite == "skip")
    batches = iter(DeviceBatches(loader, context.device))
    for steps_left in reversed(range(steps)):
        lr = learning_rate(position.epoch * steps_per_epoch + position.step_in_epoch, steps_per_epoch, base=options.lr,
                           milestones=options.lr_milestones, warmup_epochs=options.warmup_epochs)
        optimizers.set_learning_rate(lr)
        losses, closer, finite = [], [], []
        guard.snapshot()
        for micro_batch, (images, labels, indices, skipped) in enumerate(itertools.islice(batches, micro_batches)):
            images = prepare_batch(images, dtype, augment=options.augment, seed=state.seed, epoch=position.epoch, indices=indices)
            last = micro_batch == micro_batches - 1
            seed_random_numbers(state.seed, position.step * micro_batches + micro_batch, context)
            with contextlib.nullcontext() if last else model.no_sync():
                loss, num_closer, embeddings_finite = model(images, labels)
                state.scaler.scale(loss / micro_batches).backward()
            losses.append(loss.detach())
            closer.append(num_closer)
            finite.append(embeddings_finite)
            skipped_images += skipped
        nonfinite = guard.nonfinite(losses)
        state.scaler.step_all(optimizers.all, nonfinite)
        guard.rollback(nonfinite)
        optimizers.zero_grad()
        position.step, position.step_in_epoch = position.step + 1, position.step_in_epoch + 1
        guard.check(log.add(step=position.step, epoch=position.epoch, lr=lr, loss=torch.stack(losses).mean(),
                            num_closer=torch.cat(closer), finite=torch.stack(finite).all()))
        stopped_by = stop.poll() if stop is not None else None
        if stopped_by:
            break
        if steps_left:  # after the last one the caller does both
            is_best = (evaluator is not None and evaluator.is_due(position.step)
                       and evaluate_and_note(state, log, guard, evaluator))
            if writer is not None and (is_best or writer.is_due(position.step)):
                save(state, log, guard, writer, is_best=is_best)
    log.count_skipped(skipped_images)
    return stopped_by


def evaluate_and_note(state: TrainState, log: TrainingLog, guard: StepGuard, evaluator: Evaluator) -> bool:
    """Collective. Evaluate the backbone, if there are sets; log the result, and note it if it is the best so far.

    Returns whether it is.
    """
    if not evaluator.sets:
        return False
    guard.check(log.flush())
    position = state.position
    evaluation = evaluator.run(state.backbone)
    epoch = position.epoch - (position.step_in_epoch == 0)  # of the last step: the position may stand behind its epoch
    log.add_evaluation(step=position.step, epoch=epoch, metrics=evaluation.metrics)
    log.say(f"validation at step {position.step}: {evaluation.describe(position.best_score)}")
    log.pause(evaluation.seconds)
    is_best = position.best_score is None or evaluation.score > position.best_score
    if is_best:
        position.best_score = evaluation.score
    return is_best


def build_training(
    context: DistContext, options: Options, seed: int, num_images: int, global_batch: int, identities: Sequence[str] = ()
) -> tuple[TrainState, DistributedDataParallel]:
    """Collective. Backbone, this rank's classes, optimizers: the same initial weights at every world size."""
    torch.backends.cudnn.benchmark = True
    # The fused update takes the classifier away from DistributedDataParallel: with one process, make it a group of one.
    sharded = options.enable_model_parallel or options.fuse_classifier_update
    group = init_model_parallel(context.world_size) if sharded else None
    shard = ClassShard(options.num_classes, context.rank, context.world_size) if sharded else ClassShard(options.num_classes, 0, 1)
    torch.manual_seed(seed)
    backbone = build_backbone(options.training_arch, EMBEDDING_SIZE)
    if options.channels_last:
        backbone = backbone.to(memory_format=torch.channels_last)
    if options.compile:
        backbone.compile()
    if options.sync_bn:
        backbone = convert_sync_batchnorm(backbone, context.device.type)
    classifier = ArcFaceClassifier(
        EMBEDDING_SIZE, shard, scale=options.scale, margin=options.margin, easy_margin=options.easy_margin, seed=seed,
        device=context.device, dtype=getattr(torch, options.precision), group=group,
        model_parallel_dim=options.model_parallel_dim or 1,
    )
    autocast_dtype = amp_dtype(options, context.device.type) if options.enable_amp_mode else None
    model = TrainingModel(backbone, classifier, autocast_dtype).to(context.device, getattr(torch, options.precision))
    let_ddp_ignore_shards(model)
    optimizers = Optimizers(model, options)
    classifier.loss = classifier_loss(options, context, classifier, autocast_dtype, optimizers)
    scaler = SharedGradScaler(context.device.type, enabled=autocast_dtype == torch.float16)
    wrapped = DistributedDataParallel(model, device_ids=[context.device] if context.device.type == "cuda" else None)
    fix_gradient_buckets(wrapped)
    state = TrainState(
        backbone, classifier, optimizers, scaler, Position(), seed, num_images, global_batch, list(identities)
    )
    return state, wrapped


def classifier_loss(
    options: Options, context: DistContext, classifier: ArcFaceClassifier, autocast_dtype: torch.dtype | None, optimizers: Optimizers
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The margin softmax that --classifier, --classifier-memory-mib and --fuse-classifier-update ask for."""
    if options.classifier == "torchshard":
        return margin_softmax_torchshard
    memory_mib = options.classifier_memory_mib
    if memory_mib is None:
        memory_mib = automatic_memory_mib(classifier.weight, context.processes_per_node, options.fuse_classifier_update)
    return functools.partial(
        margin_softmax,
        memory_mib=memory_mib,
        operands=autocast_dtype if context.device.type == "cuda" else None,  # a CPU only loses by it
        update=optimizers.of_shard if options.fuse_classifier_update else None,
        update_if_finite=options.on_nonfinite == "skip",
    )


def shared_facts(options: Options, dataset: TrainingImages, sets: Sequence[EvalSet]) -> dict[str, object]:
    """What must be the same on all nodes: program, data, and every flag but those that are about one node alone."""
    own = {"data", "index", "rank", "world_size", "dist_url", "gpu", "workers", "output", "resume", "init_from", "imgs_root",
           "pair_list", "val_pairs", "val_bin"}
    flags = {f"--{name.replace('_', '-')}": value for name, value in vars(options).items() if name not in own}
    return {"program (hash of its files)": program_fingerprint(), **flags, "--resume given": bool(options.resume),
            "--init-from given": bool(options.init_from), "number of images": len(dataset),
            "number of identities": len(dataset.identities),
            "training data (hash of identity names and labels)": data_fingerprint(dataset),
            "evaluation sets": {eval_set.name: (eval_set.size, len(eval_set.images)) for eval_set in sets}}


def data_fingerprint(dataset: TrainingImages) -> str:
    """Of the labels in order and the identities' names: what decides which class an image is trained as. Seconds for 10**8."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(np.ascontiguousarray(dataset.labels))
    digest.update(b"\0".join(map(os.fsencode, dataset.identities)))
    return digest.hexdigest()


def choose_seed(options: Options, context: DistContext) -> int:
    """Collective. --seed, or one that rank 0 draws for all."""
    if options.seed is not None:
        return options.seed
    return broadcast_integer(secrets.randbits(31), context.device)


# ---------------------------------------------------------------------------------------------------------------------
# Before the processes start


def check_batch(options: Options, plan: ProcessPlan) -> None:
    """The batch must divide by processes and micro-batches, and leave BatchNorm at least two images. Raises UserError."""
    parts = plan.processes_per_node * options.accumulation_steps
    flag = f"--batch-size {options.batch_size}"
    if options.batch_size % parts:
        raise UserError(
            f"{flag}: the images of one node must divide by {plan.processes_per_node} processes x "
            f"{options.accumulation_steps} micro-batches (--accumulation-steps); give a multiple of {parts}, such as "
            f"{-(-options.batch_size // parts) * parts}"
        )
    per_rank = options.batch_size // parts
    if per_rank == 1 and (not options.sync_bn or plan.world_size == 1):
        fix = f"give at least {2 * parts}" + (", or --sync-bn" if plan.world_size > 1 else "")
        raise UserError(
            f"{flag}: leaves one image per process and micro-batch, of which BatchNorm has no statistics; {fix}"
        )


def check_fused_update(options: Options, plan: ProcessPlan) -> None:
    """What --fuse-classifier-update cannot serve on this machine. Raises UserError."""
    if not options.fuse_classifier_update:
        return
    if not options.enable_model_parallel and plan.world_size > 1:
        raise UserError(f"--fuse-classifier-update: a classifier that {plan.world_size} processes have a copy of each needs the "
                        "mean of their gradients before a step; add --enable-model-parallel, or drop it")
    if options.enable_amp_mode and amp_dtype(options, plan.device_type) == torch.float16:
        raise UserError("--fuse-classifier-update with fp16: whether the loss scale overflowed is known only after all gradients "
                        "are; use --amp-dtype bf16 where the GPU has it, or drop one of them")


def open_validation_sets(options: Options) -> list[EvalSet]:
    """The sets of --val-pairs and --val-bin, every image decoded once: not after an epoch. Raises UserError."""
    sets = open_sets([Source("pairs", path, "--val-pairs", options.imgs_root) for path in options.val_pairs]
                     + [Source("bin", path, "--val-bin") for path in options.val_bin])
    check_images(sets, progress=is_first_process())
    return sets


def open_dataset(options: Options, plan: ProcessPlan) -> TrainingImages:
    """Open and check the training images. Raises UserError.

    One process of a node does the work: the others are started later, or wait for the first one and take its index.
    """
    if is_recordio(options.data):
        if options.index != "auto":
            raise UserError(f"--index {options.index}: {options.data} is a package, which keeps its list beside the .rec; drop the flag")
        dataset = RecordIODataset(options.data, progress=is_first_process())
    else:
        require_no_package(options.data)
        dataset = FaceFolder(options.data, index=options.index, progress=is_first_process())
    dataset.check_headers(options.skip_bad_images, progress=is_first_process())
    identities, global_batch = len(dataset.identities), options.batch_size * plan.nodes
    if identities > options.num_classes:
        raise UserError(f"--num-classes {options.num_classes}: {dataset.root} has {identities} identities; "
                        f"give at least {identities}")
    if len(dataset) < global_batch:
        raise UserError(f"--batch-size {options.batch_size}: one step takes {global_batch} images over all nodes, and "
                        f"{dataset.root} has {len(dataset)}; give a smaller batch")
    return dataset


def make_output(options: Options) -> None:
    """--output must be a directory that can be written: better found out now than after an epoch. Raises UserError."""
    try:
        os.makedirs(options.output, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.output):
            pass
        if os.path.isdir(os.path.join(options.output, LATEST)):
            raise IsADirectoryError(0, f"{LATEST} is a directory there")
    except OSError as error:
        raise UserError(f"--output {options.output}: cannot be written ({error.strerror}); give another directory") from None


def run_table(options: Options, plan: ProcessPlan, dataset: TrainingImages, sets: Sequence[EvalSet]) -> str:
    """What is about to run, a line each."""
    backbone_parameters = sum(
        parameter.numel() for parameter in build_backbone(options.training_arch, EMBEDDING_SIZE).parameters()
    )
    shard = ClassShard(options.num_classes, 0, plan.world_size if options.enable_model_parallel else 1)
    bytes_per_value = 8 if options.precision == "float64" else 4
    center_mib = shard.size * EMBEDDING_SIZE * bytes_per_value / 2**20
    global_batch = options.batch_size * plan.nodes
    per_rank = global_batch // plan.world_size // options.accumulation_steps
    steps_per_epoch = len(dataset) // global_batch
    device = torch.cuda.get_device_name(plan.gpu or 0) if plan.device_type == "cuda" else "CPU"
    precision = options.precision
    if options.enable_amp_mode:
        autocast = str(amp_dtype(options, plan.device_type)).removeprefix("torch.")
        operands = f"{autocast} products summed in float32" if plan.device_type == "cuda" else "float32"
        precision = f"mixed: backbone {autocast}, classifier {operands}"
    rows = {
        "device": f"{device}, {plan.backend}",
        "processes": f"{plan.world_size} = {plan.nodes} nodes x {plan.processes_per_node} ({plan.launcher}), "
                     f"this is node {plan.node_rank}",
        "backbone": f"{options.training_arch}, {backbone_parameters:,} parameters, embedding {EMBEDDING_SIZE}"
                    + (", synchronised BatchNorm" if options.sync_bn else ""),
        "classifier": f"{options.num_classes:,} classes, {options.num_classes * EMBEDDING_SIZE:,} parameters, "
                      + ("sharded over all processes" if options.enable_model_parallel else "a copy in every process"),
        "class centers": f"up to {shard.size:,} per process: {center_mib:,.0f} MiB, "
                         + (f"{2 * center_mib:,.0f} MiB with momentum" if options.fuse_classifier_update
                            else f"{3 * center_mib:,.0f} MiB with gradient and momentum"),
        "loss": f"ArcFace, scale {options.scale:g}, margin {options.margin:g} "
                f"({'easy' if options.easy_margin else 'hard'})",
        "images": f"{len(dataset):,} of {len(dataset.identities):,} identities in {dataset.root}",
        "batch": f"{global_batch} images = {plan.world_size} processes x {options.accumulation_steps} micro-batches x "
                 f"{per_rank}",
        "schedule": f"{options.epochs} epochs x {steps_per_epoch:,} steps, learning rate {options.lr:g}, "
                    + "x 0.1 at epochs " + (", ".join(f"{milestone:g}" for milestone in options.lr_milestones) or "(never)")
                    + (f", warm-up {options.warmup_epochs:g} epochs" if options.warmup_epochs else "")
                    + (f", stop at step {options.max_steps:,}" if options.max_steps else ""),
        "optimizer": f"SGD, momentum {options.momentum:g}, weight decay {options.weight_decay:g}"
                     + (", ZeRO over the replicated parameters" if options.enable_zero_optim else ""),
        "precision": precision,
        "output": os.path.abspath(options.output) + (" (no checkpoints)" if options.no_save else ""),
    }
    if sets:
        when = f"every {options.val_freq:,} steps" if options.val_freq else "after every epoch"
        rows["evaluation"] = (", ".join(f"{eval_set.name} ({eval_set.size})" for eval_set in sets) + f", {when}"
                              + ("" if options.no_save else f"; the best: {BEST}"))
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def evaluate(options: Options, plan: ProcessPlan) -> None:
    """--evaluate: the pair accuracy of the model of --resume, in this one process."""
    eval_set, = open_sets([Source("pairs", options.pair_list, "--pair-list", options.imgs_root)])
    backbone, arch = load_backbone(options.resume, options.arch)
    print(f"{arch} of {options.resume}, {eval_set.size} of {eval_set.source}", flush=True)
    device = torch.device(plan.device_type, plan.gpu or 0) if plan.device_type == "cuda" else torch.device("cpu")
    result = evaluate_set(backbone, eval_set, DistContext(0, 1, 1, device), batch_size=options.batch_size,
                          workers=options.workers, print_freq=options.print_freq)
    print(result.report)


if __name__ == "__main__":
    exit_on_user_error(main)
