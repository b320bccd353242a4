#!/usr/bin/env python3
"""Evaluate a face recognition backbone: weights -> embeddings -> evaluation sets -> report.

    python3 valid.py --batch-size 1024 -workers 16 --imgs-root data/lfw/imgs --pair-list data/lfw/pair.list \
        --resume checkpoint.pth.tar
    python3 valid.py --bin lfw.bin,cfp_fp.bin,agedb_30.bin --resume checkpoint.pth.tar --plot roc.png --report DIR
    python3 valid.py --ijb data/IJBC --resume checkpoint.pth.tar
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

import torch
from torch import nn

from models import ANY_TIMM, BACKBONES, build_backbone, check_arch
from utils.checkpoint.weights import CHANNEL_ORDERS, Weights, open_weights, weights_fingerprint
from utils.dist.context import DistContext, describe_gpu, set_matmul
from utils.errors import UserError, exit_on_user_error, require_printed
from utils.evaluation import plots
from utils.evaluation.calibration import calibrate
from utils.evaluation.operating_points import FARS
from utils.evaluation.protocol import EvalSet, Result
from utils.evaluation.report import CONTENT_FILE, PAGE_FILE, describe_run, summarise, write_report
from utils.evaluation.sets import SetFlags, Source, check_images, evaluate_set, open_sets
from utils.files import atomic_write, require_directory, require_writable
from utils.flags import flag, parse_flags
from utils.launch.plan import NodeFlags, is_first_process, plan_node, warn_of_unused_environment
from utils.launch.spawn import launch
from utils.memory import keep_freed_memory


@dataclass(frozen=True)
class Options(SetFlags, NodeFlags):
    """The flags of valid.py, beside those that decide processes and devices."""

    imgs_root: str | None = flag("--imgs-root", metavar="DIR", section="evaluation sets",
                                 help="the images of the pairs, aligned, 112x112")
    pair_list: str | None = flag("--pair-list", metavar="FILE", section="evaluation sets",
                                 help="lines of: path1 path2 0|1, with paths relative to --imgs-root; or LFW's "
                                      "pairs.txt")
    skip_missing_pairs: bool = flag("--skip-missing-pairs", default=False, section="evaluation sets",
                                    help="leave out, and count, pairs with a missing image, instead of stopping")
    bin: tuple[str, ...] = flag("--bin", default=(), metavar="FILE,FILE,...", section="evaluation sets",
                                help="sets in one file each, such as lfw.bin,cfp_fp.bin, with or without a list")
    resume: str | None = flag("--resume", metavar="PATH", section="model",
                              help="checkpoint.pth.tar, or the weights of a published backbone")
    arch: str | None = flag("-a", "--arch", metavar="ARCH", choices=BACKBONES, more_choices=ANY_TIMM,
                            default_text="that of the checkpoint", section="model",
                            help="architecture, required with --untrained")
    channel_order: str | None = flag(
        "--channel-order", choices=CHANNEL_ORDERS, default_text="that of the file", section="model",
        help="order of the colors that the network in --resume was trained with")
    untrained: bool = flag("--untrained", default=False, section="model",
                           help="random initial weights instead of --resume, as a baseline")
    seed: int | None = flag("--seed", metavar="S", at_least=0, below=2**63, section="model", default_text="0",
                            help="of --untrained; nothing else is random")
    batch_size: int = flag("-b", "--batch-size", default=256, metavar="N", at_least=1, section="evaluation",
                           help="images that a process embeds at a time")
    workers: int = flag("-j", "--workers", "-workers", default=4, metavar="N", at_least=0, section="evaluation",
                        help="image reading processes; 0 reads in the main process")
    flip: bool | None = flag("--flip", default_text="on with --ijb and --tinyface, else off", section="evaluation",
                             help="sum the embeddings of each image and of its mirror image")
    far: tuple[float, ...] = flag(
        "--far", default=(), metavar="FAR,FAR,...", above=0, below=1, section="output",
        default_text="with --report and --calibration: 0.1, 0.01, ..., 1e-06",
        help="print the threshold and the true accept rate for each false accept rate, with their intervals of 95 %")
    report: str | None = flag("--report", metavar="DIR", section="output",
                              help=f"write {PAGE_FILE} with error rates, scores and the worst errors, and "
                                   f"{CONTENT_FILE}, of which scripts/report.py makes pages that compare runs")
    calibration: str | None = flag("--calibration", metavar="FILE", section="output",
                                   help="fit the probability that a pair is of one person on the set, and write it "
                                        "with the thresholds of --far, for embed.py --calibration")
    json: str | None = flag("--json", metavar="FILE", section="output", help="write the results with their ROC curves; "
                            'for several sets as {"sets": {name: result}}')
    plot: str | None = flag("--plot", metavar="FILE", section="output",
                            help="draw the ROC curves of all sets: .png, .svg or .pdf")
    montage: str | None = flag("--montage", metavar="FILE", section="output",
                               help="draw the worst false accepts and false rejects of each set: .png or .jpg")
    print_freq: int = flag("-p", "--print-freq", default=100, metavar="N", at_least=1, section="output",
                           help="batches between reports if the output is not a terminal")


def main() -> None:
    options = parse_options()
    plan = plan_node(options)
    warn_of_unused_environment(plan)
    sources = [Source("pairs", options.pair_list, "--pair-list", options.imgs_root,
                      options.skip_missing_pairs)] if options.pair_list else []
    sources += [Source("bin", path, "--bin") for path in options.bin]
    sets = open_sets(sources + options.sources(bool(options.flip)))
    if options.report is not None:
        require_directory("--report", options.report)
    for name, path in output_files(options).items():
        # A result replaces an older one.
        require_writable(name, path, force=True, inputs=filter(None, [options.resume, options.pair_list, *options.bin]))
    if options.calibration is not None and len(sets) > 1:
        raise UserError(f"--calibration {options.calibration}: is fitted on one set; give one instead of {len(sets)}")
    if options.resume and plan.launcher != "single":
        # reports unusable weights before processes are started
        open_weights(options.resume, options.arch, channel_order=options.channel_order)
    if is_first_process():
        for eval_set in sets:
            print(f"=> {eval_set.name}: {eval_set.contents}")
        if len(sets) > 1:  # a bad image in the last set must not waste the work on the others
            check_images(sets, progress=True)
    if plan.launcher == "single":
        set_matmul(plan.matmul)
        evaluate(DistContext(0, 1, 1, plan.device), options, sets)
    else:
        launch(evaluate, plan, options, sets)


def evaluate(context: DistContext, options: Options, sets: list[EvalSet]) -> None:
    """Collective. Embed and score the sets; rank 0 prints the results and writes the files."""
    if context.device.type == "cpu":
        keep_freed_memory()
    backbone, source, weights = load(options)
    mean_face = weights.mean_face if weights is not None else None
    model = source + (", with mirrored images" if options.flip else "")
    run = describe_run(os.path.dirname(os.path.abspath(options.resume)) if options.resume else None, model,
                       weights.settings if weights is not None else {}) if context.is_main and options.report else None
    if context.is_main:
        processes = f"{context.world_size} processes, each " if context.world_size > 1 else ""
        device = (f"cuda ({describe_gpu(context.device)})" if context.device.type == "cuda"
                  else f"cpu ({torch.get_num_threads()} threads)")
        print(f"=> {source}\n=> device {processes}{device}, batch size {options.batch_size}, "
              f"{options.workers} workers" + (", with mirrored images" if options.flip else ""), flush=True)
    started = time.perf_counter()
    results: dict[str, Result] = {}
    for eval_set in sets:
        result = evaluate_set(backbone, eval_set, context, batch_size=options.batch_size, workers=options.workers,
                              flip=bool(options.flip), print_freq=options.print_freq, mean_face=mean_face,
                              embeddings=options.embeddings)
        if result is not None:
            results[eval_set.name] = result
    if not context.is_main:
        return
    print(f"=> evaluated in {time.perf_counter() - started:.1f} s")
    for name, result in results.items():
        print(f"=> {name}: {result.details}")
    for name, result in results.items():
        print((f"{name}\n" if len(results) > 1 else "") + result.report)
    reports = [summarise(name, result, options.far or FARS) for name, result in results.items()
               ] if options.far or options.report or options.calibration else []
    for one in [one for one in reports if one.points] if options.far or options.calibration else ():
        print((f"{one.name}\n" if len(reports) > 1 else "") + one.describe_points())
    for name, path in output_files(options).items():
        if name != "--calibration":
            write(name, path, results)
    try:
        if options.report is not None and run is not None:
            write_report(options.report, replace(run, sets=reports))
            print(f"=> {os.path.join(options.report, PAGE_FILE)}")
        if options.calibration is not None:
            (name, result), = results.items()
            fitted = calibrate(name, result, reports[0].points, weights_fingerprint(backbone), bool(options.flip))
            fitted.write(options.calibration)
            print(f"=> {options.calibration}: for embed.py --calibration; C_llr {fitted.cost:.3f} bits")
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror or error})") from None
    require_printed()


def write(name: str, path: str, results: dict[str, Result]) -> None:
    """Write the file of the flag `name`. Raises UserError."""
    try:
        if name == "--plot":
            plots.draw_roc([curve for result in results.values() for curve in result.curves], path)
        elif name == "--montage":
            drawing = [result.montage for result in results.values() if result.montage]
            plots.draw_montage([section for montage in drawing for section in montage()], path)
        else:
            objects = {set_name: result.json for set_name, result in results.items()}
            content = {"sets": objects} if len(objects) > 1 else next(iter(objects.values()))
            with atomic_write(path) as file:
                file.write(json.dumps(content, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{name} {path}: cannot be written ({error.strerror or error})") from None


def load(options: Options) -> tuple[nn.Module, str, Weights | None]:
    """The backbone, what it is in words, and the rest of its file, if there is one. Raises UserError."""
    if options.resume:
        weights = open_weights(options.resume, options.arch, channel_order=options.channel_order)
        return weights.backbone, weights.describe(options.resume), weights
    assert options.arch is not None
    torch.manual_seed(options.seed or 0)
    return build_backbone(options.arch), f"untrained {options.arch}, seed {options.seed or 0}", None


def output_files(options: Options) -> dict[str, str]:
    """{flag: path} of the files to write."""
    paths = {"--json": options.json, "--plot": options.plot, "--montage": options.montage,
             "--calibration": options.calibration}
    return {name: path for name, path in paths.items() if path is not None}


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse and check the flags without opening a file. Raises UserError."""
    o = parse_flags(Options, "valid.py", "Evaluate a face recognition backbone.", argv)
    more_sets = o.sources(bool(o.flip))
    if o.flip is None:
        o = replace(o, flip=bool(more_sets))
    for name, value, other in (("--imgs-root", o.imgs_root, o.pair_list), ("--pair-list", o.pair_list, o.imgs_root)):
        if not value and (other or not (o.bin or more_sets)):
            raise UserError(f"{name} is missing: give the images and the pairs with --imgs-root DIR --pair-list FILE"
                            + ("" if o.bin or more_sets else ", or --bin FILE, --ijb DIR or --tinyface DIR"))
    if o.skip_missing_pairs and not o.pair_list:
        raise UserError("--skip-missing-pairs: has no effect without --pair-list; add it, or drop the flag")
    if o.untrained and o.resume:
        raise UserError(f"--untrained with --resume {o.resume}: drop one of them")
    if not o.untrained and not o.resume:
        raise UserError("--resume is missing: give a checkpoint, or --untrained with -a ARCH for a baseline")
    if o.untrained and not o.arch:
        raise UserError("--untrained: give the architecture with -a ARCH, such as -a mobilefacenet")
    if o.seed is not None and not o.untrained:
        raise UserError(f"--seed {o.seed}: only --untrained draws random weights; drop one of them, or add --untrained")
    if o.arch:
        check_arch(o.arch)
    if o.untrained and o.channel_order is not None:
        raise UserError(f"--channel-order {o.channel_order}: is for the weights of --resume; drop the flag")
    if o.resume and not os.path.exists(o.resume):
        raise UserError(f"--resume {o.resume}: no such file")
    flag_of: dict[str, str] = {}
    if o.report is not None:
        flag_of = {os.path.abspath(os.path.join(o.report, file)): "--report" for file in (PAGE_FILE, CONTENT_FILE)}
    for name, path in output_files(o).items():
        if (other := flag_of.setdefault(os.path.abspath(path), name)) != name:
            raise UserError(f"{name} {path}: is also the file of {other}; choose another name")
    if o.plot is not None and not (o.pair_list or o.bin or o.ijb):
        raise UserError(f"--plot {o.plot}: these sets have no ROC curve; drop the flag")
    if o.far and not (o.pair_list or o.bin):
        raise UserError("--far: these sets have no scores of pairs, from which thresholds with intervals come; drop "
                        "the flag")
    if o.calibration is not None and not (o.pair_list or o.bin):
        raise UserError(f"--calibration {o.calibration}: these sets have no scores of pairs; drop the flag")
    if o.montage is not None and not (o.pair_list or o.bin):
        raise UserError(f"--montage {o.montage}: these sets have no pairs of images; drop the flag")
    if o.plot is not None:
        plots.check_picture("--plot", o.plot, plots.PLOT_FORMATS)
        plots.require_matplotlib("--plot")
    if o.montage is not None:
        plots.check_picture("--montage", o.montage, plots.MONTAGE_FORMATS)
    return o


if __name__ == "__main__":
    exit_on_user_error(main)
