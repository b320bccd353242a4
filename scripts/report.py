#!/usr/bin/env python3
"""One HTML page about a run, or one that compares several.

    python3 valid.py --resume OUTPUT/checkpoint.pth.tar --report OUTPUT/report ...
    python3 scripts/report.py OUTPUT [OUTPUT ...] --output page.html

The page has the settings of the checkpoint, the curves of metrics.jsonl, and what valid.py --report has written to
OUTPUT/report or OUTPUT. It needs no network and no other file.
"""

from __future__ import annotations

import dataclasses
import os
import sys

# Python puts the script's own directory on sys.path instead of the repository's root.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

from utils.checkpoint.layout import LATEST  # noqa: E402
from utils.checkpoint.safe_load import read_weights  # noqa: E402
from utils.checkpoint.weights import settings_in  # noqa: E402
from utils.errors import Parser, UserError, exit_on_user_error  # noqa: E402
from utils.evaluation.curves import METRICS_FILE, read_metrics  # noqa: E402
from utils.evaluation.report import CONTENT_FILE, PAGE_FILE, RunReport, encode_page, read_json, render  # noqa: E402
from utils.files import atomic_write, require_writable  # noqa: E402


def main() -> None:
    parser = Parser("report.py", "One HTML page about a run, or one that compares several.")
    parser.add_argument("outputs", nargs="+", metavar="OUTPUT",
                        help="directory of a run, with what valid.py --report has written to its report/, or the "
                             "directory of such a report")
    parser.add_argument("--output", metavar="FILE.html", help=f"page to write (default: {PAGE_FILE} in OUTPUT; needed "
                                                              "with several)")
    parser.add_argument("--force", action="store_true", help="replace an existing page")
    options = parser.parse_args()
    output = options.output
    if output is None:
        if len(options.outputs) > 1:
            raise UserError("--output is missing: give the page to write, such as --output comparison.html")
        output = os.path.join(options.outputs[0], PAGE_FILE)
    elif not output.endswith(".html"):
        raise UserError(f"--output {output}: the name must end in .html")
    runs = [read_run(directory, name) for directory, name in zip(options.outputs, run_names(options.outputs))]
    require_writable("--output", output, force=options.force)
    page = encode_page(render(runs))
    try:
        with atomic_write(output) as file:
            file.write(page)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error})") from None
    print(f"=> {output}")


def run_names(directories: list[str]) -> list[str]:
    """What the page calls the runs: their directories' names, or paths where two would share a name."""
    for number, directory in enumerate(directories):
        if directory in directories[:number]:
            raise UserError(f"{directory}: given twice; drop one")
    names = [os.path.basename(os.path.abspath(directory)) for directory in directories]
    return [name if names.count(name) == 1 else directory for name, directory in zip(names, directories)]


def read_run(directory: str, name: str) -> RunReport:
    """What a directory has of a run. Raises UserError if it has nothing, or something damaged."""
    if not os.path.isdir(directory):
        raise UserError(f"{directory}: no such directory; give the --output of a run, or the --report of valid.py")
    content, metrics, checkpoint = (
        next((path for path in (os.path.join(directory, name) for name in names) if os.path.exists(path)), None)
        for names in ((CONTENT_FILE, os.path.join("report", CONTENT_FILE)), (METRICS_FILE,), (LATEST,)))
    if content is None and metrics is None:
        raise UserError(f"{directory}: has neither {METRICS_FILE} nor {CONTENT_FILE}; give the --output of a run, or "
                        "the --report of valid.py")
    run = read_json(content, name) if content is not None else RunReport(name)
    if metrics is not None:
        try:
            steps, evaluations = read_metrics(metrics)
        except UserError as error:
            if content is None:
                raise
            print(f"warning: {error}; the page has no curves of this training", file=sys.stderr)
        else:
            run = dataclasses.replace(run, steps=steps, evaluations=evaluations)
    if checkpoint is not None and (settings := settings_in(read_weights(checkpoint))):
        run = dataclasses.replace(run, settings=settings)
    return run


if __name__ == "__main__":
    exit_on_user_error(main)
