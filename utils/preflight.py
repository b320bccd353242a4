"""What main.py checks, opens and prints before it starts any process, so that mistakes show before the first step."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence

import numpy as np
import torch

from data.exclude import read_exclusions
from data.formats import open_training_set
from data.training_set import TrainingSet
from losses.class_major import WALK, choose_form
from models import build_backbone, is_timm
from models.freeze import freeze
from models.sync_batchnorm import has_other_batchnorm
from utils.build import check_fused_dtype
from utils.checkpoint.layout import BEST, LATEST, STEPS_DIRECTORY
from utils.checkpoint.reader import AUTO, Checkpoint
from utils.dist.sharding import ClassShard
from utils.errors import UserError, printable
from utils.evaluation.protocol import EvalSet
from utils.evaluation.sets import Source, check_images, open_sets
from utils.files import require_directory
from utils.flags import describe_section, flags_of
from utils.launch.fingerprint import program_fingerprint
from utils.launch.plan import ProcessPlan, is_first_process
from utils.memory import host_bytes
from utils.options import AUTO_CLASSES, Options, loss_flags
from utils.planner import BackboneMemory, RunSettings, predict_memory
from utils.training.metrics import TENSORBOARD_DIRECTORY
from utils.training.optim import count_states
from utils.training.scaler import amp_dtype


def check_batch(options: Options, plan: ProcessPlan) -> None:
    """Raise UserError unless processes and micro-batches divide the batch and leave BatchNorm at least two images."""
    parts = plan.processes_per_node * options.accumulation_steps
    if options.batch_size % parts:
        raise UserError(f"--batch-size {options.batch_size}: give a multiple of {parts}, for {plan.processes_per_node} "
                        f"processes x {options.accumulation_steps} micro-batches (--accumulation-steps)")
    if options.batch_size == parts and (not options.sync_bn or plan.world_size == 1):
        raise UserError(f"--batch-size {options.batch_size}: leaves one image per process and micro-batch, too few for "
                        f"BatchNorm statistics; give at least {2 * parts}"
                        + (", or add --sync-bn" if plan.world_size > 1 else ""))


def check_fused_update(options: Options, plan: ProcessPlan) -> None:
    """Raise UserError if this run's processes or their device rule out --fuse-classifier-update."""
    if not options.fuse_classifier_update:
        return
    if not options.enable_model_parallel and plan.world_size > 1:
        raise UserError(f"--fuse-classifier-update: the {plan.world_size} processes must average the gradients of a "
                        "replicated classifier before they update it; add --enable-model-parallel, or drop the flag")
    check_fused_dtype(options, amp_dtype(options.amp_dtype, plan.device) if options.enable_amp_mode else None)


def check_freeze(options: Options, *, fresh: bool) -> None:
    """Raise UserError for a part that the backbone does not have. fresh: the run continues no checkpoint."""
    if not options.freeze:
        return
    if fresh and not options.init_from:
        raise UserError(f"--freeze {','.join(options.freeze)}: --resume {options.resume} finds no checkpoint, and a "
                        "fresh run would keep random initial weights; give trained ones with --init-from")
    with torch.device("meta"):
        freeze(build_backbone(options.training_arch, options.embedding_size), options.freeze)


def check_sync_bn(options: Options) -> None:
    """Raise UserError if --sync-bn would change what the network computes."""
    if options.sync_bn and is_timm(options.training_arch):
        with torch.device("meta"):
            backbone = build_backbone(options.training_arch, options.embedding_size)
        if has_other_batchnorm(backbone):
            raise UserError(f"--sync-bn with --arch {options.training_arch}: its BatchNorm layers include activations, "
                            "which synchronized ones would leave out; drop --sync-bn, or choose another network")


def check_classifier(options: Options, plan: ProcessPlan) -> None:
    """Raise UserError if the device does not serve --classifier."""
    _form(options, plan)


def _form(options: Options, plan: ProcessPlan) -> str:
    """What computes the loss: that of `choose_form`, or "torchshard"."""
    if options.classifier == "torchshard":
        return options.classifier
    return choose_form(options.classifier, plan.device, getattr(torch, options.precision))


def check_sampling(options: Options, plan: ProcessPlan) -> None:
    """Raise UserError if --sample-rate would sample a classifier of which each process has a copy."""
    if options.sample_rate < 1 and not options.enable_model_parallel and plan.world_size > 1:
        raise UserError(f"--sample-rate {options.sample_rate:g}: the {plan.world_size} processes would average the "
                        "gradient of all classes of a replicated classifier; add --enable-model-parallel, or drop the "
                        "flag")


def check_memory(options: Options, plan: ProcessPlan) -> str:
    """What the run needs at least of the memory that there is, for the table. Raises UserError if it cannot fit.

    The backbone's activations are left out: it takes seconds to predict them, and the first step needs them all.
    """
    with torch.device("meta"):
        backbone = build_backbone(options.training_arch, options.embedding_size)
        freeze(backbone, options.freeze)
    weights = tuple(weight.nbytes for weight in backbone.parameters() if weight.requires_grad)
    kept = sum(weight.nbytes for weight in backbone.parameters()) - sum(weights)
    gpu = torch.cuda.get_device_properties(plan.device) if plan.device_type == "cuda" else None
    total, sharing = (gpu.total_memory, 1) if gpu else (host_bytes(), plan.processes_per_node)
    states = count_states(options.optimizer, options.momentum)
    parts = predict_memory(BackboneMemory(weights, kept, 0, 0), RunSettings(
        classes=options.num_classes, sub_centers=options.sub_centers,
        batch_size=options.batch_size * plan.nodes // options.accumulation_steps,
        world_size=plan.world_size, total_bytes=total // sharing, cache_bytes=None if gpu else 2**23,
        model_parallel=options.enable_model_parallel, zero=options.enable_zero_optim,
        optimizer_states=states, ema=options.ema is not None, fused_update=options.fuse_classifier_update,
        classifier_memory_mib=options.classifier_memory_mib or 0, embedding_size=options.embedding_size,
        sample_rate=options.sample_rate, micro_batches=options.accumulation_steps,
        device_type="cpu", class_major=_form(options, plan) not in (WALK, "torchshard")))
    parts["optimizer, beyond activations"] = 0  # depends on the activations
    need = sum(parts.values()) * (2 if options.precision == "float64" else 1)
    text = (f"at least {_size(need)} per process, without activations; "
            + ("a GPU" if gpu else "this machine" if sharing == 1 else f"{sharing} processes share a machine that")
            + f" has {_size(total)}")
    if need * sharing > total:
        centers = sum(size for name, size in parts.items() if "class centers" in name)
        flag = (f"--num-classes {options.num_classes}" if 2 * centers > sum(parts.values())
                else f"--batch-size {options.batch_size}")
        raise UserError(f"{flag}: the run needs {text}; "
                        + memory_remedies(options, plan.world_size, activations="batch" in flag))
    return text


def memory_remedies(options: Options, world_size: int, *, activations: bool = True) -> str:
    """What to change in a run that does not fit into memory. activations: whether they may be the cause."""
    fused = not (options.fuse_classifier_update or options.accumulation_steps > 1
                 or options.classifier == "torchshard" or options.amp_dtype == "fp16"
                 or world_size > 1 and not options.enable_model_parallel)
    return "try " + ", ".join(remedy for remedy, helps in (
        ("--enable-model-parallel", not options.enable_model_parallel),
        ("more GPUs or nodes", world_size == 1 or options.enable_model_parallel),
        ("--fuse-classifier-update", fused),
        ("--precision float32", options.precision == "float64"),
        ("--enable-amp-mode", activations and not options.enable_amp_mode and options.precision == "float32"),
        ("--checkpoint-activations", activations and not (options.checkpoint_activations or options.compile
                                                          or is_timm(options.training_arch))),
        ("a smaller --batch-size", activations),
        ("fewer --sub-centers", options.sub_centers > 1),
        ("fewer classes", True),
    ) if helps) + " (scripts/plan.py predicts the need)"


def _size(bytes_: int) -> str:
    return f"{bytes_ / 2**30:,.1f} GiB" if bytes_ < 2**40 else f"{bytes_ / 2**40:,.1f} TiB"


def check_shared_memory(options: Options, plan: ProcessPlan) -> None:
    """Raise UserError unless /dev/shm has room for the semaphores of the data loading processes."""
    workers = -(-options.workers // plan.processes_per_node)
    # A page each: 3 for each process and 10 or so for all; an evaluation has a loader of its own.
    need = plan.processes_per_node * 2 * (12 + 4 * workers) * os.sysconf("SC_PAGE_SIZE") if workers else 0
    try:
        room = os.statvfs("/dev/shm")
        free = room.f_bavail * room.f_frsize
    except OSError:
        free = 0
    if free < need:
        raise UserError(f"--workers {options.workers}: data loading processes need {need // 1024:,} KiB in /dev/shm, "
                        f"which has {free // 1024:,} KiB free; make it larger (docker run --shm-size), or use -j 0")


def open_validation_sets(options: Options) -> list[EvalSet]:
    """The sets of --val-pairs and --val-bin, every image decoded once. Raises UserError."""
    sets = open_sets([Source("pairs", path, "--val-pairs", options.imgs_root, options.skip_missing_pairs)
                      for path in options.val_pairs]
                     + [Source("bin", path, "--val-bin") for path in options.val_bin])
    check_images(sets, progress=is_first_process())
    return sets


def open_dataset(options: Options, plan: ProcessPlan) -> TrainingSet:
    """Open the training images and check them against --num-classes and --batch-size. Raises UserError."""
    assert options.data is not None
    dataset = open_training_set(options.data, index=options.index, skip_bad=options.skip_bad_images,
                                progress=is_first_process(), identities=options.identities,
                                exclude=options.exclude)
    global_batch = options.batch_size * plan.nodes
    if options.num_classes != AUTO_CLASSES and len(dataset.identities) > options.num_classes:
        raise UserError(f"--num-classes {options.num_classes}: give at least {len(dataset.identities)}, the identities "
                        f"of {dataset.root}")
    if len(dataset) < global_batch:
        raise UserError(f"--batch-size {options.batch_size}: a step takes {global_batch} images over all nodes, and "
                        f"{dataset.root} has {len(dataset)}; give a smaller batch")
    return dataset


def count_classes(options: Options, dataset: TrainingSet, resumed: Checkpoint | None = None) -> Options:
    """The options with the number of identities in place of --num-classes auto. Raises UserError.

    resumed: the checkpoint that the run is likely to continue, which must have as many classes.
    """
    if options.num_classes != AUTO_CLASSES:
        return options
    identities = len(dataset.identities)
    if identities < 2:
        raise UserError(f"--num-classes auto: {dataset.root} has {identities} identity, and a classifier needs at "
                        "least 2; give another DIR")
    if resumed is not None and (classes := resumed.contents["num_classes"]) != identities:
        remedy = (f"give --num-classes {classes}" if classes > identities else "start a run in another --output with "
                  f"--init-from {resumed.path}, which takes class centers by name")
        raise UserError(f"--num-classes auto: {dataset.root} has {identities} identities, and {resumed.path} was "
                        f"trained with {classes} classes; {remedy}")
    return dataclasses.replace(options, num_classes=identities)


def make_output(options: Options) -> None:
    """Create --output. Raises UserError unless checkpoints can be written there."""
    require_directory("--output", options.output)
    for names, is_in_the_way, what in (
        ((LATEST, BEST), os.path.isdir, "a directory"),
        ((STEPS_DIRECTORY, TENSORBOARD_DIRECTORY), lambda path: os.path.lexists(path) and not os.path.isdir(path),
         "no directory"),
    ):
        for name in names:
            if is_in_the_way(os.path.join(options.output, name)):
                raise UserError(f"--output {options.output}: {name} is {what} there; remove it, or give another "
                                "directory")


def shared_facts(options: Options, dataset: TrainingSet, sets: Sequence[EvalSet]) -> dict[str, object]:
    """What must be the same on all nodes: program, training data, and every flag that is not `per_node`."""
    # Labels in order and names: together they decide which class an image is trained as.
    training_data = hashlib.blake2b(np.ascontiguousarray(dataset.labels).data, digest_size=8)
    training_data.update(b"\0".join(map(os.fsencode, dataset.identities)))
    return {
        "program (hash of its files)": program_fingerprint(),
        **{definition.name: getattr(options, field) for field, definition in flags_of(Options).items()
           if not definition.per_node},
        **{loss_flags()[field].name: value for field, value in options.loss_settings.items()},
        "--resume given": bool(options.resume),
        "--resume auto": options.resume == AUTO,
        "--init-from given": bool(options.init_from),
        "number of images": len(dataset),
        "number of identities": len(dataset.identities),
        "training data (hash of identity names and labels)": training_data.hexdigest(),
        "--exclude (hash of its lines)": read_exclusions(options.exclude).digest() if options.exclude else None,
        "evaluation sets": {eval_set.name: (eval_set.size, len(eval_set.images)) for eval_set in sets},
    }


def _describe_form(options: Options, plan: ProcessPlan) -> str:
    form = _form(options, plan)
    return form if form == "torchshard" else f"{options.classifier} ({form if form == WALK else f'class-major {form}'})"


def run_table(
    options: Options, plan: ProcessPlan, dataset: TrainingSet, sets: Sequence[EvalSet],
    resumed: Checkpoint | None = None,
) -> str:
    """A description of the run, one line per topic. resumed: the checkpoint that it is likely to continue."""
    with torch.device("meta"):
        backbone = build_backbone(options.training_arch, options.embedding_size)
    freeze(backbone, options.freeze)
    fixed = sum(p.numel() for p in backbone.parameters() if not p.requires_grad)
    shard = ClassShard(options.num_classes, 0, plan.world_size if options.enable_model_parallel else 1)
    centers, own_centers = (classes * options.sub_centers for classes in (options.num_classes, shard.size))
    center_mib = own_centers * options.embedding_size * getattr(torch, options.precision).itemsize / 2**20
    stores_gradient, states = not options.fuse_classifier_update, count_states(options.optimizer, options.momentum)
    gradients = stores_gradient * options.sample_rate
    held = ["gradient"] * stores_gradient + [[], ["momentum"], ["two moments"]][states]
    global_batch = options.batch_size * plan.nodes
    micro_batch = global_batch // plan.world_size // options.accumulation_steps
    device = torch.cuda.get_device_name(plan.device) if plan.device_type == "cuda" else "CPU"
    precision = options.precision
    if options.enable_amp_mode:
        low = str(amp_dtype(options.amp_dtype, plan.device)).removeprefix("torch.")
        precision = f"mixed: backbone {low}, classifier " + (
            f"{low} products summed in float32" if plan.device_type == "cuda" else "float32")
    if plan.matmul is not None and options.precision == "float32":
        precision += f", float32 products {plan.matmul}"
    spare = options.num_classes - len(dataset.identities)
    without = f" ({spare:,} of them without images; none with --num-classes auto)" if spare else ""
    rows = {
        "device": f"{device}, {plan.backend}",
        "processes": f"{plan.world_size} = {plan.nodes} nodes x {plan.processes_per_node} ({plan.launcher}), "
                     f"this is node {plan.node_rank}",
        "backbone": f"{options.training_arch}, {sum(p.numel() for p in backbone.parameters()):,} parameters, "
                    f"embedding {options.embedding_size}" + (", synchronized BatchNorm" if options.sync_bn else "")
                    + (", activation checkpointing" if options.checkpoint_activations else "")
                    + (", compiled" if options.compile else "") + (", channels last" if options.channels_last else "")
                    + (f", frozen: {', '.join(options.freeze)} ({fixed:,} parameters)" if options.freeze else ""),
        "classifier": f"{options.num_classes:,} classes{without}, "
                      + (f"{options.sub_centers} centers each, " if options.sub_centers > 1 else "")
                      + f"{centers * options.embedding_size:,} parameters, "
                      + ("sharded over all processes" if options.enable_model_parallel else "a copy per process")
                      + f", {_describe_form(options, plan)}",
        "class centers": f"up to {own_centers:,} per process: {center_mib:,.0f} MiB"
                         + (f", {(1 + gradients + states) * center_mib:,.0f} MiB with "
                            f"{' and '.join(held)}"
                             if held else ""),
        "loss": f"{options.build_margin().describe()}, scale {options.loss_scale:g}"
                + (", slope 1" if options.margin_gradient == "unit" else "")
                + (f", classes above {options.inter_class_filter:g} left out"
                   if options.inter_class_filter is not None else "")
                 + (f", over the targets and {options.sample_rate:.4g} of the classes, drawn in each step"
                    if options.sample_rate < 1 else ""),
        "images": dataset.describe(),
        "batch": f"{global_batch} images = {plan.world_size} processes x {options.accumulation_steps} micro-batches x "
                 f"{micro_batch}",
        "training": f"{options.epochs} epochs x {len(dataset) // global_batch:,} steps"
                    + f", augmentation {options.augment}"
                    + (f", stops at step {options.max_steps:,}" if options.max_steps else ""),
        "schedule": describe_section(options, "schedule"),
        "optimizer": describe_section(options, "optimizer")
                     + (", ZeRO over the replicated parameters" if options.enable_zero_optim else ""),
        "precision": precision,
        "output": os.path.abspath(options.output) + (" (no checkpoints)" if options.no_save else ""),
    }
    if resumed is not None:
        position = resumed.contents["position"]
        rows["resumes"] = f"{resumed.path}, step {position['step']:,}, epoch {position['epoch'] + 1}"
    elif options.init_from:
        rows["starts from"] = options.init_from + (
            f", whose colors are {options.channel_order}" if options.channel_order else "")
    if sets:
        when = f"every {options.val_freq:,} steps" if options.val_freq else "after every epoch"
        rows["evaluation"] = ", ".join(f"{eval_set.name} ({eval_set.size})" for eval_set in sets) + f", {when}" + (
            "" if options.no_save else f"; the best: {BEST}")
    return "\n".join(f"{name:<13}  {printable(value)}" for name, value in rows.items())
