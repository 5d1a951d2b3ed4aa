"""What becomes of an attempt to move a session."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Result(StrEnum):
    RESUMED = "resumed"
    FALLBACK = "fallback"
    FAILED = "failed"


class Outcome(msgspec.Struct, frozen=True):
    """What became of one attempt, as `ike-sa-sync resume --json` prints it. SPIs in hex, times in milliseconds."""

    result: Result
    connection: str | None
    gateway: str | None
    spi_i: str | None = None
    spi_r: str | None = None
    children: tuple[str, ...] = ()
    exchange_ms: float | None = None
    total_ms: float | None = None
    reason: str | None = None
    vpn: str | None = None
