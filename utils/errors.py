"""Errors that are the user's to fix: one clear line, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user gave cannot work. The message names the flag or file, the value, and what to do."""


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; a UserError becomes one line on stderr and exit status 2.

    Under torchrun all processes of a node make the same mistake: the first one tells it.
    """
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
