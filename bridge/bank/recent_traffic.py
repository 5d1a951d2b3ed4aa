"""Which of its sessions had traffic last, as a gateway posts it into the bank: another gateway that announces its
failure begins with these. Anyone who can write to the bank can forge it, so it decides about nothing but that order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from bridge.stub.stub import Index, StubError

SESSIONS_MAX: Final = 1024
"""that are posted, and that are read"""
OCTETS_MAX: Final = 100_000
"""of what a gateway writes; more is not read"""
TTL: Final = 600.0
"""seconds: between two looks at charon's list of a hundred thousand IKE_SAs are minutes"""


def encode(sessions: Iterable[Index]) -> str:
    """The one with the latest traffic first."""
    return msgspec.json.encode([str(index) for index in sessions][:SESSIONS_MAX]).decode()


def decode(text: object) -> list[Index]:
    """None where it is not what a gateway writes; each session once."""
    if not isinstance(text, bytes) or len(text) > OCTETS_MAX:
        return []
    try:
        return list(dict.fromkeys(map(Index.parse, msgspec.json.decode(text, type=list[str])[:SESSIONS_MAX])))
    except (msgspec.MsgspecError, StubError, UnicodeError, RecursionError):
        return []
