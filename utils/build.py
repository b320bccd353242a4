"""Build what a run trains: backbone, classifier, optimizers, and the model that DistributedDataParallel wraps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from losses.class_major import find_form
from losses.sampling import draw_classes
from losses.softmax import margin_softmax_torchshard
from models import build_backbone
from models.channels_last import store_channels_last
from models.checkpointing import checkpoint_activations
from models.classifier import MarginClassifier, automatic_memory_mib, class_centers
from models.freeze import freeze
from models.sync_batchnorm import convert_sync_batchnorm
from utils.dist.collectives import all_gather_json
from utils.dist.context import DistContext
from utils.dist.ddp import DDP_SETTINGS, fix_gradient_buckets
from utils.dist.sharding import ClassShard, init_model_parallel, let_ddp_ignore_shards
from utils.errors import UserError
from utils.options import Options
from utils.training.clip import GradientClip
from utils.training.ema import WeightAverage
from utils.training.optim import ROW_OPTIMIZERS, Optimizers, count_states
from utils.training.scaler import SharedGradScaler, shared_amp_dtype
from utils.training.state import Position, TrainState


class TrainingModel(nn.Module):
    """Images and labels -> loss: the module that DistributedDataParallel wraps. Autocast covers the backbone only.

    frozen: modules of the backbone that stay in eval mode while the others train.
    """

    def __init__(self, backbone: nn.Module, classifier: MarginClassifier, autocast_dtype: torch.dtype | None,
                 frozen: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        self.backbone, self.classifier, self.autocast_dtype = backbone, classifier, autocast_dtype
        self._frozen = frozen

    def train(self, mode: bool = True) -> TrainingModel:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """images (n, 3, 112, 112), labels (n,) -> loss and num_closer of MarginClassifier; bool scalar, whether all
        embeddings of this rank are finite.

        keys: int64 (n,), models.randomness.image_keys, for the backbone's random numbers if it draws any.
        """
        with torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            embedding = self.backbone(images, *([keys] if getattr(self.backbone, "takes_keys", False) else []))
        return *self.classifier(embedding, labels), embedding.detach().isfinite().all()


class Unaveraged(nn.Module):
    """In place of DistributedDataParallel where no replicated parameter trains, so that there is nothing to average."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.no_sync = module, contextlib.nullcontext

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.module(*inputs)


def check_fused_dtype(options: Options, autocast_dtype: torch.dtype | None) -> None:
    """Raise UserError for --fuse-classifier-update with fp16."""
    if options.fuse_classifier_update and autocast_dtype == torch.float16:
        raise UserError("--fuse-classifier-update with fp16: an overflow of the scaled loss is known only after the "
                        "whole backward pass; use --amp-dtype bf16 if the GPU supports it, or drop one of them")


def build_training(
    context: DistContext, options: Options, seed: int, num_images: int, global_batch: int,
    identities: Sequence[str] = (), fingerprint: str = "",
) -> tuple[TrainState, DistributedDataParallel | Unaveraged]:
    """Collective. Backbone, this rank's classes and optimizers, with the same initial weights at every world size.

    fingerprint: that of this rank's training set.
    """
    torch.backends.cudnn.benchmark = True
    # The fused update and sampling take the classifier out of DistributedDataParallel: one process becomes a group of
    # one.
    sampled = options.sample_rate < 1
    sharded = options.enable_model_parallel or options.fuse_classifier_update or sampled
    group = init_model_parallel(context.world_size) if sharded else None
    rank, world_size = (context.rank, context.world_size) if sharded else (0, 1)
    shard = ClassShard(options.num_classes, rank, world_size)
    dtype = getattr(torch, options.precision)
    autocast_dtype = shared_amp_dtype(options.amp_dtype, context) if options.enable_amp_mode else None
    check_fused_dtype(options, autocast_dtype)

    torch.manual_seed(seed)
    backbone = build_backbone(options.training_arch, options.embedding_size)
    if options.channels_last:
        store_channels_last(backbone)
    if options.compile:
        backbone.compile()
    if options.sync_bn:
        backbone = convert_sync_batchnorm(backbone)
    frozen = freeze(backbone, options.freeze)
    if options.checkpoint_activations:
        checkpoint_activations(backbone)

    weight = class_centers(shard, options.embedding_size, seed, context.device, dtype,
                           parallel_dim=(options.model_parallel_dim or 1) if sharded else None,
                           sub_centers=options.sub_centers)
    settings = options.optimizer_settings
    skip_nonfinite = options.on_nonfinite == "skip"
    row_optimizer = (ROW_OPTIMIZERS[options.optimizer](weight, skip_nonfinite=skip_nonfinite, **settings)
                     if options.fuse_classifier_update or sampled else None)
    margin = options.build_margin()
    loss: Callable[..., tuple[Tensor, Tensor]] = functools.partial(
        margin_softmax_torchshard, filter_above=options.inter_class_filter)
    if options.classifier != "torchshard":
        saved_probs_mib: float | None = options.classifier_memory_mib
        if saved_probs_mib is None:
            saved_probs_mib = automatic_memory_mib(weight, context.processes_per_node, options.fuse_classifier_update,
                                                   count_states(options.optimizer, options.momentum),
                                                   options.sample_rate)
        loss = functools.partial(
            find_form(options.classifier, context.device, dtype),
            filter_above=options.inter_class_filter, saved_probs_mib=saved_probs_mib,
            update=row_optimizer.update_rows if row_optimizer and options.fuse_classifier_update else None,
            matmul_dtype=autocast_dtype if context.device.type == "cuda" else None)  # slower on a CPU
    draw = functools.partial(draw_classes, shard, options.sample_rate, seed) if sampled else None
    classifier = MarginClassifier(weight, shard, margin, scale=options.loss_scale, group=group, loss=loss,
                                  sub_centers=options.sub_centers, draw=draw)

    model = TrainingModel(backbone, classifier, autocast_dtype, frozen).to(context.device, dtype)
    let_ddp_ignore_shards(model)
    optimizers = Optimizers(
        model, options.optimizer, settings, zero=options.enable_zero_optim, skippable=skip_nonfinite,
        row_optimizer=row_optimizer, no_decay=options.no_decay or (),
        backbone_lr_scale=options.backbone_lr_scale or 1.0)
    clipped = [*backbone.parameters(), *([weight] if options.clip_centers else [])]
    scaler = SharedGradScaler(context.device.type, enabled=autocast_dtype == torch.float16)
    # Nodes may hold the images under other names: then all fingerprints count, on all ranks alike.
    images = "+".join(sorted(set(all_gather_json(fingerprint, context.device))))
    wrapped: DistributedDataParallel | Unaveraged = Unaveraged(model)
    if not sharded or any(parameter.requires_grad for parameter in backbone.parameters()):
        wrapped = DistributedDataParallel(model, device_ids=[context.device] if context.device.type == "cuda" else None,
                                          **DDP_SETTINGS)
        fix_gradient_buckets(wrapped)
    state = TrainState(
        backbone=backbone, classifier=classifier, optimizers=optimizers, scaler=scaler, position=Position(),
        arch=options.training_arch, seed=seed, num_images=num_images, global_batch=global_batch,
        identities=list(identities), loss=options.loss,
        loss_settings={"scale": options.loss_scale, **options.loss_settings}, margin=margin, images=images,
        ema=WeightAverage(backbone, options.ema) if options.ema is not None else None,
        clip=GradientClip(options.clip_grad_norm, clipped) if options.clip_grad_norm is not None else None,
    )
    return state, wrapped
