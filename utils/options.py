"""The command line of main.py: validated, frozen options."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data.union import IDENTITIES
from losses.margins import MARGINS, Margin
from models import ANY_TIMM, BACKBONES, check_arch, is_timm
from models.freeze import WHOLE
from utils.checkpoint.reader import AUTO
from utils.checkpoint.weights import CHANNEL_ORDERS, MAX_EMBEDDING_SIZE
from utils.errors import Parser, UserError
from utils.flags import Flag, add_flags, check_values, flag, flags_of
from utils.launch.plan import ProcessFlags
from utils.training.optim import NO_DECAY, OPTIMIZER_SETTINGS, OPTIMIZERS
from utils.training.schedules import SCHEDULE_SETTINGS, ScheduleFlags

EMBEDDING_SIZE = 512  # the default
AUTO_CLASSES = 0  # --num-classes auto, until the training set is open

SECTIONS = ("data", "model", "loss", "training", "schedule", "optimizer", "output", "evaluation",
            "processes and devices", "parallelism and precision", "speed and memory")


@dataclass(frozen=True)
class Options(ProcessFlags, ScheduleFlags):
    """What the user asked for. Options never change; a derived value gets a name of its own."""

    data: str | None = flag("data", metavar="DIR", section="data", per_node=True,
                            help="training images, aligned, 112x112: DIR/train/<identity>/*.jpg if DIR/train exists, "
                                 "else DIR/<identity>/*.jpg; or a RecordIO package, as a directory or .rec file; or "
                                 "several of these: DIR1,DIR2")
    identities: str | None = flag(
        "--identities", choices=IDENTITIES, default_text="separate", section="data",
        help="with several sets; shared: identities of the same name are one class; separate: never")
    index: str = flag(
        "--index", default="auto", metavar="FILE", section="data", per_node=True,
        help="file that keeps the list of a folder's images, so that the next start need not read every header again; "
             "auto: in DIR, or among the user's caches if DIR is read-only; none: keep no list. For several sets: as "
             "many files, with commas")
    exclude: str | None = flag(
        "--exclude", metavar="FILE", section="data", per_node=True,
        help="train without what its lines name: 'drop image IDENTITY/FILE', 'drop identity NAME', 'merge NAME into "
             "NAME' (scripts/audit.py proposes such a file)")
    skip_bad_images: bool = flag("--skip-bad-images", default=False, section="data",
                                 help="count and skip images that cannot be read, instead of stopping at the first")
    augment: str = flag("--augment", default="flip", choices=("none", "flip", "standard", "strong"), section="data",
                        help="flip: random mirror; standard: also random shifts of up to 6 pixels; strong: also, each "
                             "in some images, crop, low resolution, blur, brightness, contrast, saturation, gray")
    workers: int = flag("-j", "--workers", default=4, metavar="N", at_least=0, section="data", per_node=True,
                        help="data loading processes of this node, shared among its ranks")

    arch: str | None = flag("-a", "--arch", metavar="ARCH", choices=BACKBONES, more_choices=ANY_TIMM,
                            default_text="iresnet50", section="model", help="backbone")
    embedding_size: int = flag("--embedding-size", default=EMBEDDING_SIZE, metavar="D", at_least=1,
                               at_most=MAX_EMBEDDING_SIZE, section="model", help="length of an embedding")
    num_classes: int = flag("--num-classes", default=1000, metavar="C", at_least=2, section="model",
                            words={"auto": AUTO_CLASSES},
                            help="classes of the classifier, at least the number of identities; auto: that number")
    sync_bn: bool = flag("--sync-bn", default=False, section="model",
                         help="compute BatchNorm statistics over all ranks, not on each rank alone")

    loss: str = flag("--loss", default="arcface", metavar="NAME", choices=MARGINS, section="loss",
                     help="margin of the softmax loss")
    scale: float | None = flag(
        "--scale", metavar="S", above=0, section="loss", help="scale of the cosines", default_text=", ".join(
            f"{scale:g} for {' and '.join(name for name, margin in MARGINS.items() if margin.default_scale == scale)}"
            if scale != Margin.default_scale else f"{scale:g}"
            for scale in sorted({margin.default_scale for margin in MARGINS.values()}, reverse=True)))
    margin_gradient: str = flag(
        "--margin-gradient", default="exact", choices=("exact", "unit"), section="loss",
        help="slope of the target logit by the cosine; unit: 1, as in insightface, which changes the logit in place")
    inter_class_filter: float | None = flag(
        "--inter-class-filter", metavar="T", at_least=-1, at_most=1, section="loss",
        help="leave out, for each image, other classes with a cosine above T: probably the same person again")
    sample_rate: float = flag(
        "--sample-rate", default=1.0, metavar="R", above=0, at_most=1, section="loss",
        help="part of the classes that each step uses, drawn at random, beside the targets of its batch (PartialFC); "
             "others keep their centers and momentum. Needs --enable-model-parallel, or one process")

    sub_centers: int = flag(
        "--sub-centers", default=1, metavar="K", at_least=1, section="loss",
        help="centers of each class, of which each image uses the closest: wrong images of an identity gather at "
             "centers of their own. 3 in the publication")

    epochs: int = flag("--epochs", default=35, metavar="N", at_least=1, section="training", help="number of epochs")
    start_epoch: int | None = flag("--start-epoch", metavar="N", at_least=0, default_text="0", section="training",
                                   help="first epoch of a fresh run; a resumed run continues where it stopped")
    max_steps: int | None = flag(
        "--max-steps", metavar="N", at_least=1, section="training",
        help="stop when the global step, counted over epochs and resumes, reaches N; the schedule does not change")
    batch_size: int = flag("-b", "--batch-size", default=512, metavar="N", at_least=1, section="training",
                           help="images per step of this node: the total over its processes and micro-batches")
    accumulation_steps: int = flag("--accumulation-steps", default=1, metavar="K", at_least=1, section="training",
                                   help="micro-batches per step")
    freeze: tuple[str, ...] = flag(
        "--freeze", default=(), metavar="PART,PART,...", section="training",
        help="parts of the backbone that stay as --init-from gives them, BatchNorm statistics too: names of its "
             "modules, stem for what comes before the stages, or backbone for all of it")
    seed: int | None = flag("--seed", metavar="S", at_least=0, below=2**63, default_text="drawn, printed and stored",
                            section="training", help="seed of all random numbers")
    on_nonfinite: str = flag("--on-nonfinite", default="stop", choices=("stop", "skip"), section="training",
                             help="if the loss is inf or NaN: stop before anything is saved, or skip the step, "
                                  "leaving weights, optimizer state and BatchNorm statistics unchanged")

    optimizer: str = flag("--optimizer", default="sgd", metavar="NAME", choices=OPTIMIZERS, section="optimizer",
                          help="optimizer of backbone and class centers")
    momentum: float | None = flag("--momentum", metavar="M", at_least=0, below=1, section="optimizer",
                                  default_text="0.9", help="SGD momentum")
    weight_decay: float | None = flag("--wd", "--weight-decay", metavar="W", at_least=0, section="optimizer",
                                      default_text="0.0001, adamw 0.1", help="weight decay")
    no_decay: tuple[str, ...] | None = flag(
        "--no-decay", metavar="KIND,...", choices=NO_DECAY, section="optimizer",
        help="parameters of the backbone without weight decay (norm: weights and biases of normalisation layers; bias: "
             "biases of all layers)")
    clip_grad_norm: float | None = flag(
        "--clip-grad-norm", metavar="X", above=0, section="optimizer",
        help="scale the gradient of the backbone so that its norm is at most X")
    clip_centers: bool = flag("--clip-centers", default=False, section="optimizer",
                              help="with --clip-grad-norm: one norm of backbone and class centers")
    ema: float | None = flag(
        "--ema", metavar="DECAY", above=0, below=1, section="optimizer",
        help="keep an exponential moving average of the backbone's weights, in checkpoints too: it is what is "
             "evaluated, exported and read by --init-from")
    backbone_lr_scale: float | None = flag(
        "--backbone-lr-scale", metavar="X", above=0, section="optimizer", default_text="1",
        help="the backbone's learning rate is X times that of the class centers, which is --lr")

    output: str = flag("--output", default=".", metavar="DIR", section="output", per_node=True,
                       default_text="the current directory",
                       help="directory for checkpoints and metrics, on node 0; other nodes may share it")
    resume: str = flag("--resume", default="", metavar="PATH", section="output", per_node=True,
                       help="checkpoint.pth.tar to continue from, or to evaluate; auto: the newest intact checkpoint "
                            "in --output, or a fresh run if there is none. On node 0, if other nodes do not share it")
    init_from: str = flag(
        "--init-from", default="", metavar="PATH", section="output", per_node=True,
        help="start a fresh run from the weights in a checkpoint.pth.tar, a published backbone, or a file from "
             "scripts/export.py; class centers are matched by identity name where both sides have names")
    channel_order: str | None = flag(
        "--channel-order", choices=CHANNEL_ORDERS, default_text="that of the file", section="output",
        help="order of the colors that the network in --init-from, or in --evaluate's --resume, was trained with")
    no_save: bool = flag("--no-save", default=False, section="output", help="write no checkpoints")
    save_freq: int | None = flag("--save-freq", metavar="N", at_least=1, section="output",
                                 help="save every N steps, in addition to every epoch and the end of the run")
    keep: int | None = flag("--keep", metavar="N", at_least=1, default_text="2", section="output",
                            help="keep the newest N checkpoints, and the best")
    print_freq: int = flag("-p", "--print-freq", default=10, metavar="N", at_least=1, section="output",
                           help="steps between reports; losses stay on the device until then")
    plan: bool = flag("--plan", default=False, section="output",
                      help="check everything, print the table of the run, and stop")

    evaluate: bool = flag("-e", "--evaluate", default=False, section="evaluation",
                          help="evaluate the model of --resume on --imgs-root and --pair-list, and stop")
    imgs_root: str | None = flag("--imgs-root", metavar="DIR", section="evaluation", per_node=True,
                                 default_text="with --val-pairs: imgs/ beside each list", help="images of the pairs")
    pair_list: str | None = flag("--pair-list", metavar="FILE", section="evaluation", per_node=True,
                                 help="lines of: path1 path2 0|1; or LFW's pairs.txt")
    skip_missing_pairs: bool = flag("--skip-missing-pairs", default=False, section="evaluation",
                                    help="leave out, and count, pairs with a missing image, instead of stopping")
    val_pairs: tuple[str, ...] = flag(
        "--val-pairs", default=(), metavar="LIST,LIST,...", section="evaluation", per_node=True,
        help="pair lists to evaluate on during training; model_best.pth.tar is the checkpoint with the best mean "
             "accuracy")
    val_bin: tuple[str, ...] = flag(
        "--val-bin", default=(), metavar="FILE,FILE,...", section="evaluation", per_node=True,
        help=".bin evaluation sets such as lfw.bin,cfp_fp.bin to evaluate on during training")
    val_freq: int | None = flag("--val-freq", metavar="STEPS", at_least=1, default_text="every epoch",
                                section="evaluation",
                                help="steps between evaluations, each after a save; the end is always evaluated")

    enable_model_parallel: bool = flag("--enable-model-parallel", default=False, section="parallelism and precision",
                                       help="shard the class centers over all processes of all nodes (TorchShard)")
    model_parallel_dim: int | None = flag(
        "--model-parallel-dim", metavar="D", default_text="1", section="parallelism and precision",
        help="with --enable-model-parallel: dimension to shard; 1 or -1, the classes")
    enable_zero_optim: bool = flag("--enable-zero-optim", default=False, section="parallelism and precision",
                                   help="shard the optimizer state of replicated parameters (ZeRO stage 1)")
    enable_amp_mode: bool = flag("--enable-amp-mode", default=False, section="parallelism and precision",
                                 help="mixed-precision backbone; class centers and softmax stay in float32")
    amp_dtype: str | None = flag(
        "--amp-dtype", choices=("auto", "bf16", "fp16"), default_text="auto", section="parallelism and precision",
        help="with --enable-amp-mode; auto: bf16 where the device supports it, else fp16 with loss scaling")
    precision: str = flag("--precision", default="float32", choices=("float32", "float64"),
                          section="parallelism and precision",
                          help="float64 computes everything in double precision, for verification")

    classifier: str = flag("--classifier", default="fused", choices=("fused", "eager", "triton", "torchshard"),
                           section="speed and memory",
                           help="fused: walk over the classes in chunks and never hold all logits, in the form that "
                                "serves the device; eager or triton: the form for GPUs, in PyTorch's operators or with "
                                "Triton's kernels; torchshard: the reference composed of torchshard's functions, for "
                                "comparison")
    classifier_memory_mib: int | None = flag(
        "--classifier-memory-mib", metavar="MIB", at_least=0, section="speed and memory",
        default_text="a quarter of the memory that the class centers leave free",
        help="memory per process for probabilities saved for the backward pass, which recomputes those that do not fit")
    fuse_classifier_update: bool = flag("--fuse-classifier-update", default=False, section="speed and memory",
                                        help="update the class centers within the backward pass: their gradient is "
                                             "never stored, which takes 8 bytes per value instead of 12 (adamw: 12 "
                                             "instead of 16)")
    checkpoint_activations: bool = flag(
        "--checkpoint-activations", default=False, section="speed and memory",
        help="keep only the input of each block of the backbone, and compute the block again in the backward pass")
    compile: bool = flag("--compile", default=False, section="speed and memory", help="torch.compile the backbone")
    channels_last: bool = flag("--channels-last", default=False, section="speed and memory",
                               help="NHWC memory layout of the backbone: faster with half precision on GPUs")

    # Settings of --loss by name; MARGINS[loss](**loss_settings) is the margin. {} means its defaults.
    loss_settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def training_arch(self) -> str:
        """The backbone to train. (--evaluate without --arch takes the checkpoint's.)"""
        return self.arch or "iresnet50"

    @property
    def loss_scale(self) -> float:
        """--scale, or the scale of the loss's publication."""
        return MARGINS[self.loss].default_scale if self.scale is None else self.scale

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """The optimizer's arguments."""
        return {name: getattr(self, name) for name in OPTIMIZER_SETTINGS[self.optimizer]}

    def build_margin(self) -> Margin:
        """The margin of --loss, with its settings."""
        margin = MARGINS[self.loss](**self.loss_settings)
        margin.unit_gradient = self.margin_gradient == "unit"
        return margin


def main_flags() -> dict[str, Flag]:
    """All flags of main.py: those of Options and those of the losses."""
    return {**flags_of(Options), **loss_flags()}


def loss_flags() -> dict[str, Flag]:
    """The settings of all losses as flags that are unset by default; --help shows each loss's defaults."""
    flags = {loss: flags_of(margin) for loss, margin in MARGINS.items()}
    merged = {}
    for field in dict.fromkeys(field for own in flags.values() for field in own):
        of_loss = {loss: own[field] for loss, own in flags.items() if field in own}
        first, texts = next(iter(of_loss.values())), {one.help for one in of_loss.values()}
        merged[field] = dataclasses.replace(
            first, default=None, at_least=None, above=None, at_most=None, below=None,
            default_text=", ".join(f"{loss} {one.describe_default() or 'off'}" for loss, one in of_loss.items()),
            help=first.help if len(texts) == 1 else "; ".join(f"{loss}: {one.help}" for loss, one in of_loss.items()))
    return merged


def complete_loss_settings(loss: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a loss: the given ones, and its defaults for the others.

    Raises UserError if a given setting is out of range, or the loss does not have it.
    """
    own = flags_of(MARGINS[loss])
    for field, value in given.items():
        if field not in own:
            others = " or ".join(f"--loss {name}" for name, margin in MARGINS.items() if field in flags_of(margin))
            raise UserError(f"{loss_flags()[field].describe(value)}: --loss {loss} does not have this setting; "
                            f"drop it, or choose {others}")
        own[field].check(value)
    return {field: given.get(field, definition.default) for field, definition in own.items()}


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse `argv` (default: the program's arguments) and check all that does not depend on the machine or the data.

    Raises UserError for a flag that is unknown or out of range, and for flags that conflict.
    """
    parser = Parser(
        "main.py", "Large-scale parallel ArcFace training: one process per GPU, class centers sharded over them.")
    add_flags(parser, main_flags(), SECTIONS)
    values = vars(parser.parse_args(argv))
    given = {field: value for field in loss_flags() if (value := values.pop(field)) is not None}
    return check_options(Options(**values, loss_settings=given))


def check_options(options: Options) -> Options:
    """The options with all settings of their loss. Raises UserError for a value out of range and for a conflict."""
    check_values(options)
    check_arch(options.training_arch)
    for conflict, message in _conflicts(options):
        if conflict:
            raise UserError(message)
    defaults = {**SCHEDULE_SETTINGS.get(options.schedule, {}), **OPTIMIZER_SETTINGS[options.optimizer]}
    own = {field: default for field, default in defaults.items() if getattr(options, field) is None}
    options = dataclasses.replace(options, scale=options.loss_scale, **own,
                                  loss_settings=complete_loss_settings(options.loss, options.loss_settings))
    options.build_margin()  # Its settings may contradict each other.
    return options


# What a resumed run may change on its way, and where that shows in the results.
_CHANGEABLE = ("loss", "training", "schedule", "optimizer", "parallelism and precision")


def describe_changes(saved: Mapping[str, Any], options: Options) -> str:
    """The flags that differ from those that a checkpoint saved: "--lr 0.05 (was 0.1), no --sync-bn (was --sync-bn)".

    saved: its entry "options". Flags that it does not have, of an older version, are left out.
    """
    before = {**saved, **saved.get("loss_settings", {})}
    now = {**dataclasses.asdict(options), **options.loss_settings}
    changes = []
    for field, definition in main_flags().items():
        shows = definition.section in _CHANGEABLE or field in ("augment", "exclude", "sync_bn")
        unused = now.get(field) is None and any(field in own for own in SCHEDULE_SETTINGS.values())
        if shows and not unused and field in before and field not in ("seed", "start_epoch", "max_steps"):
            new, old = (definition.describe(definition.default_text or "off" if value is None or (
                            value == () == definition.default) else value)
                        for value in (now.get(field), before[field]))
            if new != old:
                changes.append(f"{new} (was {old.removeprefix(definition.name + ' ')})")
    return ", ".join(changes)


def _without_effect(
    o: Options, choice: str, settings: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[bool, str]]:
    """As `_conflicts`: settings {value of the flag `choice`: {field: default}} that only other values have."""
    chosen, flags = getattr(o, choice), flags_of(Options)
    for field in dict.fromkeys(field for own in settings.values() for field in own):
        others = " or ".join(f"--{choice} {name}" for name, own in settings.items() if field in own)
        value = getattr(o, field)
        yield (value is not None and field not in settings.get(chosen, {}),
               f"{flags[field].describe(value)}: has no effect with --{choice} {chosen}; drop it, or choose {others}")


def _conflicts(o: Options) -> Iterator[tuple[bool, str]]:
    """(condition that must not be true, error message)."""
    milestones = list(o.lr_milestones or ())
    yield (milestones != sorted(set(milestones)),
           f"--lr-milestones {','.join(f'{m:g}' for m in milestones)}: give epochs in rising order, as 10,16,21")
    yield from _without_effect(o, "schedule", SCHEDULE_SETTINGS)
    yield from _without_effect(o, "optimizer", OPTIMIZER_SETTINGS)
    yield (o.clip_centers and o.clip_grad_norm is None,
           "--clip-centers: has no effect without --clip-grad-norm; add it, or drop --clip-centers")
    yield (o.clip_centers and o.fuse_classifier_update,
           "--clip-centers with --fuse-classifier-update: the class centers are updated within the backward pass, "
           "before the norm of all gradients is known; drop one of them")
    yield (o.clip_centers and o.sample_rate < 1,
           f"--clip-centers with --sample-rate {o.sample_rate:g}: the norm would be that of the sampled classes; drop "
           "one of them")
    for name, value in ("--save-freq", o.save_freq), ("--keep", o.keep):
        yield value is not None and o.no_save, f"{name} {value} with --no-save: drop one of them"

    if o.evaluate:
        yield (bool(o.val_pairs or o.val_bin),
               "--val-pairs and --val-bin evaluate during training, and --evaluate does not train: give it --imgs-root "
               "and --pair-list, or use python3 valid.py, which reads .bin files too")
        yield o.plan, "--plan with --evaluate: there is nothing to plan; drop one of them"
        yield o.resume in ("", AUTO), "--evaluate: name the checkpoint to evaluate with --resume PATH"
        yield (o.imgs_root is None or o.pair_list is None,
               "--evaluate: give the images and the pairs with --imgs-root and --pair-list")
        yield bool(o.init_from), f"--init-from {o.init_from} with --evaluate: give the model with --resume"
    else:
        yield o.data is None, "DIR is missing: give the directory of the training images (see main.py --help)"
        yield o.pair_list is not None, f"--pair-list {o.pair_list}: is for --evaluate; add it, or use --val-pairs"
        yield (o.imgs_root is not None and not o.val_pairs,
               f"--imgs-root {o.imgs_root}: is for --evaluate or --val-pairs; add one of them, or drop it")
    yield (o.evaluate and o.identities is not None,
           f"--identities {o.identities} with --evaluate: nothing is trained; drop one of them")
    yield (o.evaluate and o.exclude is not None,
           f"--exclude {o.exclude} with --evaluate: nothing is trained; drop one of them")
    yield (o.evaluate and bool(o.freeze),
           f"--freeze {','.join(o.freeze)} with --evaluate: nothing is trained; drop one of them")
    yield (o.skip_missing_pairs and not (o.pair_list or o.val_pairs),
           "--skip-missing-pairs: has no effect without --pair-list or --val-pairs; add one of them, or drop the flag")
    for name, setting, other, has_other in (
        ("--val-freq", o.val_freq, "--val-pairs or --val-bin", bool(o.val_pairs or o.val_bin)),
        ("--model-parallel-dim", o.model_parallel_dim, "--enable-model-parallel", o.enable_model_parallel),
        ("--amp-dtype", o.amp_dtype, "--enable-amp-mode", o.enable_amp_mode),
    ):
        yield (setting is not None and not has_other,
               f"{name} {setting}: has no effect without {other}; add it, or drop {name}")

    yield (o.channel_order is not None and not (o.init_from or o.evaluate),
           f"--channel-order {o.channel_order}: is for weights of another program; add --init-from PATH or --evaluate, "
           "or drop it")
    yield (o.checkpoint_activations and is_timm(o.training_arch),
           f"--checkpoint-activations with --arch {o.training_arch}: a network of timm would update BatchNorm's "
           "statistics twice in a step; drop one of them")
    yield (o.checkpoint_activations and o.compile,
           "--checkpoint-activations with --compile: torch.compile decides itself what to compute twice; drop one of "
           "them")

    # --resume auto is allowed: a job that is requeued starts from these weights once, and later from its own.
    yield (bool(o.init_from) and o.resume not in ("", AUTO),
           f"--init-from {o.init_from} with --resume {o.resume}: a resumed run has its own weights; drop one of them")
    yield (bool(o.freeze) and not o.init_from and not o.resume,
           f"--freeze {','.join(o.freeze)}: would keep random initial weights; give trained ones with --init-from")
    for name, without_backbone in (
        ("--clip-grad-norm", o.clip_grad_norm is not None and not o.clip_centers),
        ("--ema", o.ema is not None and not o.resume),  # an average that a run continues still changes
        ("--backbone-lr-scale", o.backbone_lr_scale is not None), ("--no-decay", o.no_decay is not None),
    ):
        yield (without_backbone and WHOLE in o.freeze,
               f"{name} with --freeze {','.join(o.freeze)}: has no effect on a backbone that does not train; drop one "
               "of them")
    yield (o.start_epoch is not None and o.resume not in ("", AUTO),
           f"--start-epoch {o.start_epoch} with --resume {o.resume}: the checkpoint says where to continue; drop "
           "--start-epoch")
    yield (o.start_epoch is not None and o.start_epoch >= o.epochs,
           f"--start-epoch {o.start_epoch}: the run ends after --epochs {o.epochs}; give a smaller epoch")

    yield (o.warmup_epochs > o.epochs,
           f"--warmup-epochs {o.warmup_epochs:g}: the run ends after --epochs {o.epochs}, before the learning rate has "
           "risen to --lr; give fewer")

    yield (o.model_parallel_dim == 0,
           "--model-parallel-dim 0: would shard the embedding dimension, but every rank needs whole cosines for the "
           "margin; shard the classes with --model-parallel-dim 1")
    yield (o.model_parallel_dim not in (None, 1, -1),
           f"--model-parallel-dim {o.model_parallel_dim}: give 1 or -1, the class dimension")

    yield (o.enable_amp_mode and o.precision == "float64",
           "--enable-amp-mode with --precision float64: drop one of them")
    yield (o.matmul is not None and o.precision == "float64",
           f"--matmul {o.matmul} with --precision float64: has no effect there; drop one of them")
    for name, is_set in ((f"--classifier-memory-mib {o.classifier_memory_mib}", o.classifier_memory_mib is not None),
                         ("--fuse-classifier-update", o.fuse_classifier_update),
                         (f"--sample-rate {o.sample_rate:g}", o.sample_rate < 1)):
        yield (is_set and o.classifier == "torchshard",
               f"{name} with --classifier {o.classifier}: has no effect there; drop one of them")
    yield (o.fuse_classifier_update and o.accumulation_steps != 1,
           f"--fuse-classifier-update with --accumulation-steps {o.accumulation_steps}: would update the class centers "
           "after every micro-batch; drop one of them")
    for name, is_set in (("--fuse-classifier-update", o.fuse_classifier_update),
                         (f"--sample-rate {o.sample_rate:g}", o.sample_rate < 1)):
        yield (is_set and o.enable_zero_optim and not o.enable_model_parallel,
               f"{name} with --enable-zero-optim: ZeRO updates a replicated classifier; add --enable-model-parallel, "
               "or drop one of them")
