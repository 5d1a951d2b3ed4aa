"""What is found in the bank that no gateway wrote: counted each time, and logged in a bounded number of lines.

Anyone with write access to the bank can put anything there, as often as they like; and a gateway with another key file
than the others cannot open any of their stubs. Neither may fill a disk with log lines.
"""

from __future__ import annotations

import time
from typing import Final

import structlog

from bridge.stub.stub import Index
from bridge.stub.types import printable

log = structlog.get_logger()

SUBJECTS_MAX: Final = 10_000
"""stubs and keys remembered as logged"""
LINES: Final = 20
LINES_SECONDS: Final = 60.0
"""so many lines at most in so many seconds"""
KEY_SHOWN: Final = 80
"""characters of a key's name in the log"""


class ContentReport:
    """Counts, and logs each stub or key once, `LINES` in `LINES_SECONDS` at most."""

    def __init__(self) -> None:
        self.unreadable = 0
        """stubs that did not open"""
        self.spoilt = 0
        """keys and members that no gateway writes"""
        self._logged: set[str] = set()
        self._window = -LINES_SECONDS
        self._lines = 0
        self._left_out = 0

    def stub(self, index: Index, reason: str) -> None:
        """A stub does not open."""
        self.unreadable += 1
        if self._may_log(str(index)):
            log.warning("stub-unreadable", index=str(index), reason=reason)

    def key(self, key: str | bytes, reason: str) -> None:
        """A key or a member of one is none that a gateway writes."""
        self.spoilt += 1
        name = printable(key if isinstance(key, str) else key.decode(errors="backslashreplace"))[:KEY_SHOWN]
        if self._may_log(name):
            log.error("bank-content-spoilt", key=name, reason=reason, fix="find out who else may write to the bank")

    def _may_log(self, subject: str) -> bool:
        if subject in self._logged:
            return False
        now = time.monotonic()
        if now - self._window >= LINES_SECONDS:
            if self._left_out:
                log.warning("bank-content-not-logged", lines=self._left_out, seconds=round(now - self._window))
            self._window, self._lines, self._left_out = now, 0, 0
        if self._lines >= LINES:
            self._left_out += 1
            return False
        self._lines += 1
        if len(self._logged) >= SUBJECTS_MAX:
            self._logged.clear()
        self._logged.add(subject)
        return True
