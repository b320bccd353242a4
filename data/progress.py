"""The bars on stderr for work that takes long."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(what: str, total: int | None, enabled: bool = True, **options: Any) -> tqdm:
    """A bar that appears after a second, if `enabled` and stderr is a terminal. options: tqdm's."""
    visible = enabled and sys.stderr.isatty()
    return tqdm(desc=what, total=total, delay=1.0, leave=False, disable=not visible, **options)
