"""Configuration files that were read, and whether any of them would be read differently now."""

from __future__ import annotations

from pathlib import Path

Sign = tuple[int, int, int] | None
"""of a file: its inode, length and time of change; None of one that is not there"""


class FilesRead:
    """Reads files and patterns of `include`, and remembers what they were."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        """those that could be read"""
        self._signs: dict[Path, Sign] = {}
        self._patterns: dict[tuple[Path, str], list[Path]] = {}

    def read(self, path: Path) -> str | None:
        """The text of a file; None where it cannot be read."""
        # before: what changes meanwhile is read again
        self._signs.setdefault(path, _sign(path))
        try:
            text = path.read_text(errors="replace")
        except OSError:
            return None
        self.files.append(path)
        return text

    def matching(self, folder: Path, pattern: str) -> list[Path]:
        """The files that a pattern names, relative to `folder` unless it begins with a slash."""
        return self._patterns.setdefault((folder, pattern), _matching(folder, pattern))

    def changed(self) -> bool:
        """Whether a file, or what a pattern names, is another one than when it was read."""
        return any(_sign(path) != sign for path, sign in self._signs.items()) or any(
            _matching(*where) != names for where, names in self._patterns.items()
        )


def _sign(path: Path) -> Sign:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _matching(folder: Path, pattern: str) -> list[Path]:
    base = Path("/") if pattern.startswith("/") else folder
    return sorted(base.glob(pattern.lstrip("/"))) if pattern.strip("/") else []
