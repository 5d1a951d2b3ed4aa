"""What a check says."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, NamedTuple


class Grade(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(NamedTuple):
    """One line of the report: what was looked at, what was found, and what to do about it."""

    grade: Grade
    name: str
    text: str
    fix: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        named = {"check": self.name, "grade": str(self.grade), "finding": self.text, "fix": self.fix}
        return named | {"mend": self.fix}  # the name that `fix` had in 0.1


def ok(name: str, text: str) -> Finding:
    return Finding(Grade.OK, name, text)


def warn(name: str, text: str, fix: str) -> Finding:
    return Finding(Grade.WARN, name, text, fix)


def fail(name: str, text: str, fix: str) -> Finding:
    return Finding(Grade.FAIL, name, text, fix)
