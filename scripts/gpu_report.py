#!/usr/bin/env python3
"""The report of scripts/gpu_check.sh: each answer in its rows of JSON, beside what was predicted.

    python3 scripts/gpu_report.py DIR        # reads DIR/rows.jsonl, writes DIR/report.md

It needs no package. Of a question that was asked several times the last rows count.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from utils.rates import DEVICES  # noqa: E402

ROWS_FILE, REPORT_FILE = "rows.jsonl", "report.md"

# The acceptance figures.
CLASSIFIER_OVER_FLOOR, STEP_OVER_PUBLISHED, CLASSES_ON_H200 = 2.5, 3.0, 30_000_000
LAUNCHES = {"triton": 400, "eager": 3000}

Row = Mapping[str, Any]
Rows = dict[tuple[str, str], Row]


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Write {REPORT_FILE} from the rows of scripts/gpu_check.sh.")
    parser.add_argument("directory", metavar="DIR", help=f"of {ROWS_FILE}")
    directory = parser.parse_args().directory
    if not os.path.isfile(os.path.join(directory, ROWS_FILE)):
        parser.error(f"{directory} has no {ROWS_FILE}; give what gpu_check.sh got as --out")
    write_report(directory)


def write_report(directory: str) -> None:
    rows, broken = read_rows(directory)
    text = report(rows, broken)
    with open(os.path.join(directory, REPORT_FILE), "w", encoding="utf-8") as file:
        file.write(text)


def read_rows(directory: str) -> tuple[Rows, int]:
    """{(question, case): row}, and the number of lines that are no row, as a process that was killed may leave one."""
    rows: Rows = {}
    dates: dict[str, Any] = {}  # of the process that asked the question; all of its rows have it
    broken = 0
    path = os.path.join(directory, ROWS_FILE)
    if not os.path.exists(path):
        return rows, broken
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                question, case, date = row["question"], row["case"], row.get("date")
                if dates.setdefault(question, date) != date:
                    dates[question] = date
                    rows = {key: old for key, old in rows.items() if key[0] != question}
                rows[question, case] = row
            except (ValueError, KeyError, TypeError):
                broken += 1
    return rows, broken


def data_sheet(rows: Rows, dry_run: bool) -> tuple[str | None, float]:
    """The name of this GPU in utils.rates.DEVICES, if it is there, and its memory in MiB. A dry run is an H100."""
    if dry_run:
        return "h100", DEVICES["h100"].memory_gib * 1024
    device = next((str(row["device"]) for row in rows.values() if row.get("capability")), "")
    name = next((name for name in DEVICES if re.search(rf"\b{name}\b", device, re.IGNORECASE)), None)
    memory = rows.get(("machine", "memory"), {}).get("total_mib")
    return name, memory or (DEVICES[name].memory_gib * 1024 if name else 0.0)


def of(rows: Rows, question: str) -> dict[str, Row]:
    """{case: row} of a question, unless a missing package left all of it out: `problems` says that."""
    return {case: row for (asked, case), row in rows.items()
            if asked == question and not (case == "all" and row.get("left_out"))}


def predicted(rows: Rows, question: str, case: str) -> Row:
    return rows.get(("predict", f"{question}: {case}"), {})


def report(rows: Rows, broken: int = 0) -> str:
    """The whole report, as Markdown."""
    first: Row = next((row for row in rows.values() if row.get("torch")), {})
    lines = [f"# GPU check: {first.get('device', 'no answer')}", ""]
    if first.get("dry_run"):
        lines += ["**Dry run on the CPU, with sizes that only show that the code runs. No figure means anything.**", ""]
    names = ("date", "capability", "driver", "torch", "cuda", "nccl", "cudnn", "triton", "commit")
    lines += [", ".join(f"{name} {first[name]}" for name in names if first.get(name)) + ".", ""]
    lines += ["## Acceptance", "", *table(("figure", "measured", "wanted", "answer"), acceptance(rows))]
    lines += section("What failed or is missing", ("question", "case", "why"), problems(rows, broken), "Nothing.")
    for title, headings, make in SECTIONS:
        if found := list(make(rows)):
            lines += section(title, headings, found)
    return "\n".join(lines).rstrip() + "\n"


def section(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], nothing: str = "") -> list[str]:
    found = list(rows)
    return [f"## {title}", "", *(table(headings, found) if found else [nothing, ""])]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)] + [""]


def number(value: Any, digits: int = 4) -> str:
    """For people; "-" if there is none."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def ms(row: Row) -> str:
    """The time of a row, or why it has none."""
    if "seconds" in row:
        return f"{number(row['seconds'] * 1e3)} ms"
    return row.get("left_out") or ("failed" if row.get("ok") is False else "-")


def ratio(one: Row, other: Row, name: str = "seconds") -> str:
    return f"{one[name] / other[name]:.2f}" if one.get(name) and other.get(name) else "-"


def answer(reached: bool | None) -> str:
    return "not measured" if reached is None else "reached" if reached else "not reached"


def acceptance(rows: Rows) -> Iterable[Sequence[str]]:
    """(figure, measured, wanted, answer): each figure of the acceptance."""
    classifier = of(rows, "classifier")
    classes = next((row["classes"] for row in classifier.values()), None)  # they are asked first
    step = classifier.get(f"{classes} bf16 kept triton", {})
    floors = [classifier.get(name, {}).get("seconds") for name in (f"{classes} bf16 products",
                                                                   f"{classes} bf16 kept memory")]
    floor = max((seconds for seconds in floors if seconds is not None), default=None)
    over = step["seconds"] / floor if floor and "seconds" in step else None
    yield ("classifier, bf16, as a multiple of its floor",
           "-" if over is None else f"{over:.2f}: {ms(step)}, {number(classes)} classes, {number(step['rows'])} rows; "
           f"products {number(floors[0] and floors[0] * 1e3)} ms, memory {number(floors[1] and floors[1] * 1e3)} ms",
           f"at most {CLASSIFIER_OVER_FLOOR:g}", answer(None if over is None else over <= CLASSIFIER_OVER_FLOOR))
    for form, limit in LAUNCHES.items():
        counts = [row["launches"] for case, row in classifier.items() if case.startswith("launches")
                  and row.get("form") == form and "launches" in row]
        most = max(counts, default=None)
        yield (f"launches of a classifier step, {form}", number(most), f"at most {number(limit)}",
               answer(None if most is None else most <= limit))
    modes = of(rows, "modes")
    waits = [case for case, row in modes.items() if row.get("ok") is False]
    yield ("steps without a wait, in each mode", f"{len(modes) - len(waits)} of {len(modes)}"
           + (f"; not: {', '.join(waits)}" if waits else ""), "all", answer(not waits if modes else None))
    speedups = {row["run"]: row["speedup"] for question in ("step", "compile") for row in of(rows, question).values()
                if row.get("way") == "ours" and row.get("speedup")}
    best = max(speedups, key=speedups.__getitem__, default=None)
    yield ("whole step, as a multiple of the published script's", "; ".join(
        f"{name}: {value:.2f}" for name, value in speedups.items()) or "-", f"at least {STEP_OVER_PUBLISHED:g}",
        answer(None if best is None else speedups[best] >= STEP_OVER_PUBLISHED))
    largest = rows.get(("largest", "trained"), {})
    trained, memory = largest.get("classes"), (largest.get("total_mib") or 0) / 1024
    enough = None if trained is None else trained >= CLASSES_ON_H200
    note = "" if memory > 130 or not memory else f" (this GPU has {memory:.0f} GiB)"
    yield ("classes on one H200, fused update", number(trained) + note, f"at least {number(CLASSES_ON_H200)}",
           answer(None if memory <= 130 and not enough else enough))


def problems(rows: Rows, broken: int) -> Iterable[Sequence[str]]:
    for (question, case), row in rows.items():
        if row.get("left_out"):
            yield question, case, f"left out: {row['left_out']}"
        elif row.get("ok") is False:
            told = {name: value for name, value in row.items() if name in (
                "error", "at", "status", "loss_error", "embedding_error", "centers_error", "difference", "weights_kept",
                "failed", "classes", "losses")}
            yield question, case, ", ".join(f"{name} {value}" for name, value in told.items())[:300].replace("|", "/") \
                .replace("\n", " ") or "failed"
    if broken:
        yield "-", "-", f"{broken} lines of {ROWS_FILE} are no rows"


def software(rows: Rows) -> Iterable[Sequence[str]]:
    for case in ("software", "memory"):
        for name, value in rows.get(("machine", case), {}).items():
            if name in ("architectures", "gpus", "python", "cores", "packages", "total_mib", "used_before",
                        "other_processes", "used_with_this_process_mib"):
                shown = ", ".join(f"{key} {text}" for key, text in value.items()) if isinstance(value, dict) else (
                    ", ".join(map(str, value)) or "none") if isinstance(value, list) else (
                    number(value) if isinstance(value, (int, float)) else value or "unknown")
                yield name, shown


def rates(rows: Rows) -> Iterable[Sequence[str]]:
    assumed = rows.get(("predict", "rates"), {})
    for case, field, name, unit in (
            ("product bf16", "tflops", "bf16_product_tflops", "TFLOP/s"),
            ("product fp16", "tflops", "bf16_product_tflops", "TFLOP/s"),
            ("product tf32", "tflops", "tf32_product_tflops", "TFLOP/s"), ("product float32", "tflops", "", "TFLOP/s"),
            ("convolution bf16", "tflops", "bf16_convolution_tflops", "TFLOP/s"),
            ("convolution tf32", "tflops", "tf32_convolution_tflops", "TFLOP/s"),
            ("copy", "gbs", "copy_gbs", "GB/s"), ("launch", "us", "launch_us", "us")):
        row = rows.get(("machine", case), {})
        if field in row:
            yield (case, f"{number(row[field])} {unit}", number(assumed.get(name)),
                   f"{row[field] / assumed[name]:.2f}" if assumed.get(name) else "-")


def kernels(rows: Rows) -> Iterable[Sequence[str]]:
    for case, row in of(rows, "kernels").items():
        if "loss_error" in row:
            errors = ("loss_error", "embedding_error", "centers_error", "allowed")
            yield (case, *(f"{row[name]:.1e}" for name in errors),
                   "yes" if row["ok"] else "**no**")


def modes(rows: Rows) -> Iterable[Sequence[str]]:
    for case, row in of(rows, "modes").items():
        losses = row.get("losses") or [row.get("loss"), row.get("next_loss")]
        yield (case, "yes" if row["ok"] else "**no**", row.get("at") or "-",
               ", ".join(number(loss) if isinstance(loss, float) else str(loss) for loss in losses if loss is not None)
               or "-")


def classifier(rows: Rows) -> Iterable[Sequence[str]]:
    found = of(rows, "classifier")
    for case, row in found.items():
        if row.get("form") != "triton" or "chunk" in row or case.startswith("launches"):
            continue
        base = case.removesuffix(" triton")
        products = found.get(f"{row['classes']} {row['precision']} products", {})
        memory = found.get(f"{base} memory", {})
        floor = max(products, memory, key=lambda each: each.get("seconds", 0.0))
        eager = found.get(f"{base} eager", {})
        guess, eager_guess = (predicted(rows, "classifier", f"{base} {form}") for form in ("triton", "eager"))
        yield (base, ms(row), ms(eager), ms(found.get(f"{base} walk", {})), ms(products), ms(memory),
               ratio(row, floor), ms(guess), ratio(row, guess), ms(eager_guess), ratio(eager, eager_guess))


def chunks(rows: Rows) -> Iterable[Sequence[str]]:
    for case, row in of(rows, "classifier").items():
        if "chunk" in row and "floor" not in row:
            yield case, ms(row), f"{number(row.get('peak_mib'))} MiB"


def launches(rows: Rows) -> Iterable[Sequence[str]]:
    for case, row in of(rows, "classifier").items():
        if "launches" in row:
            yield case, number(row["launches"]), number(row["gib"]), str(row["waits"] or "none")


def tiles(rows: Rows) -> Iterable[Sequence[str]]:
    found = of(rows, "tiles")
    usual = found.get("current", {})
    for case, row in sorted(found.items(), key=lambda item: item[1].get("seconds", 1e9)):
        yield case, ms(row), ratio(row, usual)


def profile(rows: Rows) -> Iterable[Sequence[str]]:
    for case, row in of(rows, "profile").items():
        if "busy" in row:
            guess = predicted(rows, "profile", case)
            top = "; ".join(f"{name.replace('|', '/')} {milliseconds:.2f} ms" for name, milliseconds in row["top"])
            measured = {"seconds": row["step_seconds"]}
            yield (case, ms(measured), ms(guess), ratio(measured, guess), f"{row['busy']:.0%}", number(row["launches"]),
                   f"{number(row['issued_seconds'] * 1e3)} ms", top)
        elif "waiting" in row:
            yield (case, f"waits for images {row['waiting']:.1%} of the time", f"{number(row['images_per_second'])} "
                   "images/s", "-", "-", "-", "-", "-")


def backbone(rows: Rows) -> Iterable[Sequence[str]]:
    found = of(rows, "backbone")
    for case, row in found.items():
        if row.get("layout") == "NHWC":
            base = case.removesuffix(" NHWC")
            guess = predicted(rows, "backbone", base)
            yield (base, ms(row), ms(found.get(f"{base} NCHW", {})), ms(guess), ratio(row, guess),
                   number(row.get("images_per_second")), f"{number(row.get('peak_mib'))} MiB")


def steps(rows: Rows) -> Iterable[Sequence[str]]:
    for question in ("step", "compile"):
        for case, row in of(rows, question).items():
            if "way" in row:
                guess = predicted(rows, question, row["run"]) if row["way"] == "ours" else {}
                yield (case, number(row["images"]), number(row["images_per_second"]), ms(row), ms(guess),
                       ratio(row, guess), number(row.get("speedup")), f"{number(row['peak_mib'])} MiB")


def memory(rows: Rows) -> Iterable[Sequence[str]]:
    for case, row in of(rows, "memory").items():
        if "allocated_mib" in row:
            guess = predicted(rows, "memory", case)
            outside = guess.get("parts", {}).get("CUDA, cuDNN, NCCL", 0.0)
            within = {"mib": guess["mib"] - outside} if guess else {}
            yield (case, number(row["classes"]), number(within.get("mib")), number(row["allocated_mib"]),
                   ratio({"mib": row["allocated_mib"]}, within, "mib"), number(row.get("reserved_mib")),
                   number(guess.get("mib")), number(row.get("driver_mib")))


def largest(rows: Rows) -> Iterable[Sequence[str]]:
    for case, row in of(rows, "largest").items():
        seconds = row.get("step_seconds")
        yield (case, number(row.get("classes")), row.get("left_out") or "-", number(row.get("allocated_mib")),
               number(row.get("driver_mib")), number(row.get("total_mib")),
               "-" if seconds is None else f"{number(seconds * 1e3)} ms")


def saving(rows: Rows) -> Iterable[Sequence[str]]:
    for case, row in of(rows, "save").items():
        yield case, ", ".join(f"{name} {number(row[name])}" for name in (
            "gbs", "pinning_gbs", "blocked_seconds", "seconds") if name in row)
    for case, row in of(rows, "resume").items():
        yield case, ", ".join(f"{name} {number(row[name])}" for name in (
            "killed", "same_losses", "largest_difference", "seconds") if name in row) + (
                f", accuracies {row['accuracies']}" if row.get("accuracies") else "")


def two(rows: Rows) -> Iterable[Sequence[str]]:
    nvlink = rows.get(("predict", "rates"), {}).get("nvlink_gbs")
    for case, row in of(rows, "two").items():
        rate = f"{number(row['gbs'])} GB/s of {number(nvlink)}, {number(row['latency_us'])} us" if "gbs" in row else "-"
        yield (case, "yes" if row.get("ok", True) else "**no**",
               f"{row['difference']:.1e}" if "difference" in row else "-", rate)


def parts(rows: Rows) -> Iterable[Sequence[str]]:
    for case, row in of(rows, "part").items():
        yield case, f"{row['seconds']} s", "ended" if row.get("ok", True) else "**failed**"


SECTIONS: Sequence[tuple[str, Sequence[str], Callable[[Rows], Iterable[Sequence[str]]]]] = (
    ("1. The machine", ("", ""), software),
    ("Rates, beside those that the time model assumes", ("rate", "measured", "assumed", "measured / assumed"), rates),
    ("2. Kernels against float64", ("case", "loss", "embeddings' gradient", "centers' gradient", "allowed", "within"),
     kernels),
    ("Two steps without a wait", ("mode", "right", "the wait or error", "losses"), modes),
    ("3. Profile of whole steps, bf16", ("case", "step", "predicted", "measured / predicted", "busy", "launches",
                                         "issued in", "top kernels"), profile),
    ("4. The classifier", ("case", "Triton", "eager", "walk", "three products", "memory floor", "Triton / floor",
                           "predicted", "Triton / predicted", "predicted, eager", "eager / predicted"), classifier),
    ("Chunks", ("case", "step", "peak"), chunks),
    ("Launches", ("case", "launches", "GiB moved", "waits"), launches),
    ("Tiles: rows, classes, depth, warps, stages, programs", ("tiles", "step", "over what it is now"), tiles),
    ("5. The backbone", ("images, precision", "NHWC", "NCHW", "predicted", "measured / predicted", "images/s", "peak"),
     backbone),
    ("The whole step", ("run", "images", "images/s", "step", "predicted", "measured / predicted", "over published",
                        "peak"), steps),
    ("6. Saving, resuming, evaluating", ("case", "found"), saving),
    ("7. Memory, MiB", ("run", "classes", "planner, PyTorch's", "allocated", "allocated / planner", "reserved",
                        "planner, with CUDA's", "driver"), memory),
    ("The largest number of classes", ("case", "classes", "", "allocated MiB", "driver MiB", "total MiB", "step"),
     largest),
    ("8. Two GPUs", ("case", "right", "largest difference", "rate"), two),
    ("Parts", ("part", "time", ""), parts),
)


if __name__ == "__main__":
    main()
