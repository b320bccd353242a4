"""Errors that are the user's to fix: one clear line, never a traceback."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Something the user gave cannot work. The message names the flag or file, the value, and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse's, but a mistake on the command line is a UserError too: one line instead of the whole usage."""

    def __init__(self, prog: str, description: str) -> None:
        # No abbreviations: a flag that is added later must not change what an old command means.
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; a UserError becomes one line on stderr and exit status 2; Ctrl-C one word and 130."""
    try:
        main()
    except UserError as error:
        # torchrun ends all processes of a node when one has ended. All make the same mistake, so one prints it.
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") != "0":
            time.sleep(10)  # for the first one
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
