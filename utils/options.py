"""Command line -> validated, frozen options. Options are never changed afterwards; a derived value gets a name of its own."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from utils.errors import Parser, UserError

EMBEDDING_SIZE = 512
DIST_TIMEOUT = 1800.0
AUTO = "auto"  # --resume: the newest whole checkpoint in --output


@dataclass(frozen=True)
class Options:
    """What the user asked for, one field per flag of main.py (see `build_parser` for their meaning)."""

    data: str | None
    index: str
    skip_bad_images: bool
    augment: str
    workers: int
    arch: str | None
    num_classes: int
    margin: float
    scale: float
    easy_margin: bool
    sync_bn: bool
    epochs: int
    start_epoch: int | None
    max_steps: int | None
    batch_size: int
    accumulation_steps: int
    lr: float
    lr_milestones: tuple[float, ...]
    warmup_epochs: float
    momentum: float
    weight_decay: float
    seed: int | None
    output: str
    resume: str
    init_from: str
    no_save: bool
    save_freq: int | None
    keep: int | None
    on_nonfinite: str
    print_freq: int
    plan: bool
    evaluate: bool
    imgs_root: str | None
    pair_list: str | None
    val_pairs: tuple[str, ...]
    val_bin: tuple[str, ...]
    val_freq: int | None
    multiprocessing_distributed: bool
    nproc_per_node: int | None
    world_size: int
    rank: int
    dist_url: str
    dist_backend: str | None
    dist_timeout: float
    device: str
    gpu: int | None
    enable_model_parallel: bool
    model_parallel_dim: int | None
    enable_amp_mode: bool
    amp_dtype: str | None
    enable_zero_optim: bool
    precision: str
    classifier: str
    classifier_memory_mib: int | None
    fuse_classifier_update: bool
    compile: bool
    channels_last: bool

    @property
    def training_arch(self) -> str:
        """The backbone to train. (--evaluate without --arch takes the checkpoint's.)"""
        return self.arch or "iresnet50"


def _number_list(text: str) -> tuple[float, ...]:
    """'10,16,21' -> (10.0, 16.0, 21.0); '' and 'none' -> (). One argument, so that it cannot swallow the positional."""
    if text.strip() in ("", "none"):
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers such as 10,16,21") from None


def file_list(text: str) -> tuple[str, ...]:
    """'a.bin,b.bin' -> ('a.bin', 'b.bin')."""
    paths = tuple(text.split(","))
    if not all(paths):
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of files such as lfw.bin,cfp_fp.bin")
    return paths


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "main.py", "Large-scale parallel ArcFace training: one process per GPU, class centers sharded over them."
    )
    group = parser.add_argument_group("data")
    group.add_argument("data", metavar="DIR", nargs="?",
                       help="training images: DIR/train/<identity>/*.jpg if DIR/train exists, else DIR/<identity>/*.jpg; "
                            "aligned, 112x112")
    group.add_argument("--index", default="auto", metavar="FILE",
                       help="where the list of the images is kept, so that the next start need not scan the directories and "
                            "look at every file again; auto: in DIR, or if that cannot be written among the user's caches; none: "
                            "nowhere (default: %(default)s)")
    group.add_argument("--skip-bad-images", action="store_true",
                       help="count and skip images that cannot be read, where the default is to stop and name the first")
    group.add_argument("--augment", choices=("none", "flip", "standard", "strong"), default="flip",
                       help="flip: random mirror; standard: also random shifts of up to 6 pixels; strong: also, each in some "
                            "images, crop, low resolution, blur, colour changes, gray (default: %(default)s)")
    group.add_argument("-j", "--workers", type=int, default=4, metavar="N",
                       help="data loading processes of this node, shared out over its ranks (default: %(default)s)")

    group = parser.add_argument_group("model")
    group.add_argument("-a", "--arch", default=None, metavar="ARCH",
                       help="iresnet18, iresnet34, iresnet50, iresnet100, iresnet200 or mobilefacenet (default: iresnet50)")
    group.add_argument("--num-classes", type=int, default=1000, metavar="C",
                       help="classes of the classifier, at least the number of identities (default: %(default)s)")
    group.add_argument("--margin", type=float, default=0.5, metavar="M", help="ArcFace margin, radians (default: %(default)s)")
    group.add_argument("--scale", type=float, default=64.0, metavar="S", help="ArcFace scale (default: %(default)s)")
    group.add_argument("--easy-margin", action=argparse.BooleanOptionalAction, default=True,
                       help="margin only where the target cosine is positive (default: on)")
    group.add_argument("--sync-bn", action="store_true", help="BatchNorm statistics over all ranks, not each rank's own")

    group = parser.add_argument_group("schedule")
    group.add_argument("--epochs", type=int, default=35, metavar="N", help="epochs in all (default: %(default)s)")
    group.add_argument("--start-epoch", type=int, default=None, metavar="N",
                       help="first epoch of a fresh run (default: 0); a resumed run knows its own")
    group.add_argument("--max-steps", type=int, default=None, metavar="N",
                       help="stop when the global step, counted over epochs and resumes, reaches N; the schedule stays as it is")
    group.add_argument("-b", "--batch-size", type=int, default=512, metavar="N",
                       help="images per step of this node: the total over its processes and micro-batches (default: %(default)s)")
    group.add_argument("--accumulation-steps", type=int, default=1, metavar="K",
                       help="micro-batches that make one batch and one step (default: %(default)s)")
    group.add_argument("--lr", "--learning-rate", dest="lr", type=float, default=0.1, metavar="LR",
                       help="learning rate after warm-up (default: %(default)s)")
    group.add_argument("--lr-milestones", type=_number_list, default=(10.0, 16.0, 21.0), metavar="E,E,...",
                       help="epochs, counted from 0, from which the learning rate is 10 times smaller (default: 10,16,21)")
    group.add_argument("--warmup-epochs", type=float, default=0.0, metavar="E",
                       help="epochs, or a fraction of one, over which the learning rate rises linearly (default: 0)")
    group.add_argument("--momentum", type=float, default=0.9, metavar="M", help="SGD momentum (default: %(default)s)")
    group.add_argument("--wd", "--weight-decay", dest="weight_decay", type=float, default=1e-4, metavar="W",
                       help="weight decay (default: %(default)s)")
    group.add_argument("--seed", type=int, default=None, metavar="S",
                       help="everything random derives from it (default: one is drawn, printed and stored)")

    group = parser.add_argument_group("output")
    group.add_argument("--output", default=".", metavar="DIR",
                       help="where checkpoint.pth.tar and metrics.jsonl go (default: the current directory)")
    group.add_argument("--resume", default="", metavar="PATH",
                       help="checkpoint.pth.tar to continue from, or to evaluate; auto: continue from the newest whole checkpoint "
                            "in --output, or start anew if there is none")
    group.add_argument("--init-from", default="", metavar="PATH",
                       help="start a fresh run from the weights in a checkpoint.pth.tar, a published backbone, or what "
                            "scripts/export.py wrote; class centers by identity name where both sides know names")
    group.add_argument("--no-save", action="store_true", help="write no checkpoint")
    group.add_argument("--save-freq", type=int, default=None, metavar="N",
                       help="save every N steps too, beside after every epoch and at the end")
    group.add_argument("--keep", type=int, default=None, metavar="N",
                       help="checkpoints that stay, the newest N and the best (default: 2)")
    group.add_argument("--on-nonfinite", choices=("stop", "skip"), default="stop",
                       help="a loss that is inf or NaN: stop when it is read, before anything is saved; or leave the step out, "
                            "weights, momentum and BatchNorm statistics as they were (default: %(default)s)")
    group.add_argument("-p", "--print-freq", type=int, default=10, metavar="N",
                       help="steps between reports; losses stay on the device until then (default: %(default)s)")
    group.add_argument("--plan", action="store_true", help="check everything, print the table of the run, and stop")

    group = parser.add_argument_group("evaluation")
    group.add_argument("-e", "--evaluate", action="store_true",
                       help="evaluate the model of --resume on --imgs-root and --pair-list, and stop")
    group.add_argument("--imgs-root", default=None, metavar="DIR",
                       help="images of the pairs (--val-pairs without it: imgs/ beside each list)")
    group.add_argument("--pair-list", default=None, metavar="FILE", help="lines of: path1 path2 0|1")
    group.add_argument("--val-pairs", type=file_list, default=(), metavar="LIST,LIST,...",
                       help="pair lists to evaluate on while training; the best checkpoint is kept as model_best.pth.tar")
    group.add_argument("--val-bin", type=file_list, default=(), metavar="FILE,FILE,...",
                       help="evaluation sets in one file each, such as lfw.bin,cfp_fp.bin, beside --val-pairs or instead")
    group.add_argument("--val-freq", type=int, default=None, metavar="STEPS",
                       help="steps between evaluations (default: after every epoch); one more at the end of the run")

    group = parser.add_argument_group("processes and devices")
    group.add_argument("--multiprocessing-distributed", action="store_true", help="start one process per GPU of this node")
    group.add_argument("--nproc-per-node", type=int, default=None, metavar="N",
                       help="with --multiprocessing-distributed: processes of this node (default: the visible GPUs, or 1)")
    group.add_argument("--world-size", type=int, default=1, metavar="N", help="number of nodes (default: %(default)s)")
    group.add_argument("--rank", type=int, default=0, metavar="R", help="this node's number, from 0 (default: %(default)s)")
    group.add_argument("--dist-url", default="tcp://127.0.0.1:8000", metavar="URL",
                       help="where the processes meet: tcp://<address of node 0>:<free port>, or env:// (default: %(default)s)")
    group.add_argument("--dist-backend", choices=("nccl", "gloo"), default=None,
                       help="default: nccl on GPUs, gloo on the CPU")
    group.add_argument("--dist-timeout", type=float, default=DIST_TIMEOUT, metavar="SECONDS",
                       help="give up on other nodes and ranks after so long: at the start, where a node does not come, and in a "
                            "collective, which also waits while rank 0 saves (default: %(default)g)")
    group.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: GPUs if there are any")
    group.add_argument("--gpu", type=int, default=None, metavar="ID", help="the one GPU to use, for a single process")

    group = parser.add_argument_group("parallelism and precision")
    group.add_argument("--enable-model-parallel", action="store_true",
                       help="shard the class centers over all processes of all nodes (TorchShard)")
    group.add_argument("--model-parallel-dim", type=int, default=None, metavar="D",
                       help="dimension to split: 1 or -1, the classes (the default with --enable-model-parallel)")
    group.add_argument("--enable-amp-mode", action="store_true", help="mixed-precision backbone")
    group.add_argument("--amp-dtype", choices=("auto", "bf16", "fp16"), default=None,
                       help="with --enable-amp-mode; auto, the default: bf16 where the device has it, else fp16")
    group.add_argument("--enable-zero-optim", action="store_true",
                       help="share the optimizer state of replicated parameters out over the ranks (ZeRO stage 1)")
    group.add_argument("--precision", choices=("float32", "float64"), default="float32",
                       help="float64 computes everything in it, for verification (default: %(default)s)")

    group = parser.add_argument_group("speed and memory")
    group.add_argument("--classifier", choices=("fused", "torchshard"), default="fused",
                       help="fused: walks the classes in chunks and never holds the logits; torchshard: the reference, "
                            "put together from torchshard's functions, to compare with (default: %(default)s)")
    group.add_argument("--classifier-memory-mib", type=int, default=None, metavar="MIB",
                       help="of each process, to keep probabilities for the backward pass; those that do not fit are computed "
                            "again, all of them with 0 (default: a quarter of what the class centers leave of the memory)")
    group.add_argument("--fuse-classifier-update", action="store_true",
                       help="the optimizer's step of the class centers within the backward pass: their gradient is never "
                            "stored, 8 bytes per value instead of 12")
    group.add_argument("--compile", action="store_true", help="torch.compile the backbone")
    group.add_argument("--channels-last", action="store_true",
                       help="NHWC memory layout of the backbone: faster with half precision on GPUs")
    return parser


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse and check all that can be checked without looking at the machine or the data. Raises UserError."""
    options = Options(**vars(build_parser().parse_args(argv)))
    _check_ranges(options)
    _check_combinations(options)
    return options


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_ranges(o: Options) -> None:
    for flag, value, minimum in (
        ("--workers", o.workers, 0),
        ("--num-classes", o.num_classes, 2),
        ("--epochs", o.epochs, 1),
        ("--start-epoch", o.start_epoch, 0),
        ("--max-steps", o.max_steps, 1),
        ("--batch-size", o.batch_size, 1),
        ("--accumulation-steps", o.accumulation_steps, 1),
        ("--save-freq", o.save_freq, 1),
        ("--keep", o.keep, 1),
        ("--print-freq", o.print_freq, 1),
        ("--val-freq", o.val_freq, 1),
        ("--nproc-per-node", o.nproc_per_node, 1),
        ("--gpu", o.gpu, 0),
        ("--dist-timeout", o.dist_timeout, 1),
        ("--warmup-epochs", o.warmup_epochs, 0),
        ("--wd", o.weight_decay, 0),
        ("--seed", o.seed, 0),
        ("--classifier-memory-mib", o.classifier_memory_mib, 0),
    ):
        _require(value is None or (value >= minimum and math.isfinite(value)),
                 f"{flag} {value}: give a number of at least {minimum}")
    _require(o.dist_timeout <= 10**7, f"--dist-timeout {o.dist_timeout:g}: give a number of seconds up to {10**7}")
    _require(o.seed is None or o.seed < 2**63, f"--seed {o.seed}: give a number below 2**63")
    _require(math.isfinite(o.lr) and o.lr >= 0, f"--lr {o.lr}: give a number of at least 0")
    _require(0 <= o.momentum < 1, f"--momentum {o.momentum}: give a number from 0 up to, not including, 1")
    _require(0 <= o.margin <= math.pi / 2, f"--margin {o.margin}: give an angle from 0 to pi/2 radians, such as 0.5")
    _require(o.scale > 0 and math.isfinite(o.scale), f"--scale {o.scale}: give a positive number, such as 64")
    _require(list(o.lr_milestones) == sorted(set(o.lr_milestones)) and all(m >= 0 for m in o.lr_milestones),
             f"--lr-milestones {','.join(f'{m:g}' for m in o.lr_milestones)}: give epochs in rising order, such as 10,16,21")


def _check_combinations(o: Options) -> None:
    _require(o.index != "", "--index '': give a file, auto or none")
    for flag, value in (("--save-freq", o.save_freq), ("--keep", o.keep)):
        _require(value is None or not o.no_save, f"{flag} {value} with --no-save: choose one of them")
    if o.evaluate:
        _require(not o.val_pairs and not o.val_bin, "--val-pairs and --val-bin are used while training, and --evaluate does not "
                 "train: give it --imgs-root and --pair-list, or use python3 valid.py, which reads .bin files too")
        _require(not o.plan, "--plan with --evaluate: there is nothing to plan; drop one of them")
        _require(bool(o.resume), "--evaluate: give the checkpoint to evaluate with --resume")
        _require(o.resume != AUTO, "--evaluate with --resume auto: give the checkpoint to evaluate by its path")
        _require(o.imgs_root is not None and o.pair_list is not None,
                 "--evaluate: give the images and the pairs with --imgs-root and --pair-list")
    else:
        _require(o.data is not None, "DIR is missing: give the directory of the training images (see python3 main.py --help)")
        _require(o.pair_list is None, f"--pair-list {o.pair_list}: is used with --evaluate; add it, or give --val-pairs")
        _require(o.imgs_root is None or bool(o.val_pairs),
                 f"--imgs-root {o.imgs_root}: is used with --evaluate or --val-pairs; add one of them, or drop it")
    _require(o.val_freq is None or bool(o.val_pairs or o.val_bin),
             f"--val-freq {o.val_freq}: has no effect alone; give what to evaluate with --val-pairs or --val-bin")
    # With auto they go together: a job that is requeued begins from these weights once, and from its own later.
    _require(not o.init_from or o.resume in ("", "auto"),
             f"--init-from {o.init_from} with --resume {o.resume}: a resumed run has its own weights; drop one of them")
    _require(not o.init_from or not o.evaluate, f"--init-from {o.init_from} with --evaluate: give the model with --resume")
    _require(o.start_epoch is None or not o.resume,
             f"--start-epoch {o.start_epoch}: the checkpoint of --resume says where to continue; drop --start-epoch")
    _require(o.start_epoch is None or o.start_epoch < o.epochs,
             f"--start-epoch {o.start_epoch}: the run ends after --epochs {o.epochs}; give a smaller epoch")

    if o.model_parallel_dim is not None:
        _require(o.enable_model_parallel,
                 f"--model-parallel-dim {o.model_parallel_dim}: has no effect alone; add --enable-model-parallel, or drop it")
        _require(o.model_parallel_dim != 0,
                 "--model-parallel-dim 0: that would split the embedding dimension, and each rank would have a part of every "
                 "cosine only: they could not be normalised or given a margin before the whole (batch, classes) matrix was "
                 "summed over the ranks. Split the classes: --model-parallel-dim 1")
        _require(o.model_parallel_dim in (1, -1),
                 f"--model-parallel-dim {o.model_parallel_dim}: give 1 or -1, the class dimension")

    _require(o.amp_dtype is None or o.enable_amp_mode,
             f"--amp-dtype {o.amp_dtype}: has no effect alone; add --enable-amp-mode, or drop it")
    _require(not (o.enable_amp_mode and o.precision == "float64"),
             "--enable-amp-mode with --precision float64: choose one of them")
    _require(o.classifier_memory_mib is None or o.classifier == "fused",
             f"--classifier-memory-mib {o.classifier_memory_mib}: has no effect with --classifier {o.classifier}; drop one of them")
    if o.fuse_classifier_update:
        _require(o.classifier == "fused", f"--fuse-classifier-update with --classifier {o.classifier}: drop one of them")
        _require(o.accumulation_steps == 1,
                 f"--fuse-classifier-update with --accumulation-steps {o.accumulation_steps}: every micro-batch would make a step "
                 "of its own; drop one of them")
        _require(o.enable_model_parallel or not o.enable_zero_optim,
                 "--fuse-classifier-update with --enable-zero-optim: ZeRO makes the step of a replicated classifier; add "
                 "--enable-model-parallel, or drop one of them")
    _require(o.nproc_per_node is None or o.multiprocessing_distributed,
             f"--nproc-per-node {o.nproc_per_node}: add --multiprocessing-distributed, which starts the processes")
    _require(o.gpu is None or not o.multiprocessing_distributed,
             f"--gpu {o.gpu}: names the GPU of a single process; choose GPUs for --multiprocessing-distributed "
             "with the environment variable CUDA_VISIBLE_DEVICES")
    _require(o.gpu is None or o.device != "cpu", f"--gpu {o.gpu} with --device cpu: choose one of them")
    _require(o.world_size >= 1 or (o.world_size == -1 and o.dist_url == "env://"),
             f"--world-size {o.world_size}: give the number of nodes, at least 1")
    _require(0 <= o.rank < max(o.world_size, 1) or (o.rank == -1 and o.dist_url == "env://") or o.world_size == -1,
             f"--rank {o.rank}: nodes are numbered from 0 to --world-size - 1 = {o.world_size - 1}")
    _require(o.dist_url == "env://" or o.dist_url.startswith("tcp://"),
             f"--dist-url {o.dist_url}: give tcp://<address of node 0>:<free port>, or env://")
