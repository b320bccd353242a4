#!/usr/bin/env python3
"""Write the flags of main.py and valid.py into utils/FLAGS.md.

    python3 scripts/flag_tables.py            # write the file
    python3 scripts/flag_tables.py --check    # exit status 1 if it is stale
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The script's own directory is on sys.path, the repository's root is not.
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from utils.packages import require_packages

    require_packages()

import valid  # noqa: E402
from utils.errors import Parser, exit_on_user_error  # noqa: E402
from utils.flags import flag_tables, flags_of  # noqa: E402
from utils.options import SECTIONS, main_flags  # noqa: E402

PATH = ROOT / "utils" / "FLAGS.md"


def generate() -> str:
    """The contents of the file."""
    return f"""# Flags

`python3 scripts/flag_tables.py` generates this file; do not edit it. `--help` of each program shows the same.

## main.py

{flag_tables(main_flags(), SECTIONS)}

## valid.py

{flag_tables(flags_of(valid.Options))}
"""


def main() -> None:
    parser = Parser("flag_tables.py", "Write the flags of the programs to utils/FLAGS.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file is stale")
    if not parser.parse_args().check:
        PATH.write_text(generate(), encoding="utf-8")
    elif PATH.read_text(encoding="utf-8") != generate():
        sys.exit(f"{PATH} is stale: run python3 scripts/flag_tables.py")


if __name__ == "__main__":
    exit_on_user_error(main)
