"""Files of a daemon's own, that outlive it: readable by their owner only, added to, or replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path


def append(path: Path, text: str) -> None:
    """Add to a file, which is made with its folder if it is missing. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(text)


def replace(path: Path, text: str) -> None:
    """Put another file in its place: a reader sees the one or the other. Raises OSError."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    append(beside, text)
    beside.replace(path)
