"""The states of an IKE_SA that was rebuilt here, until it is an SA like any other or is gone (protocol rules 2 and 3).

Everything that affects transitions is in this file. ARCHITECTURE.md shows the table, and a test compares them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from bridge.service.transitions import Transitions


class State(StrEnum):
    INSTALLING = "installing"
    UNCONFIRMED = "unconfirmed"
    """charon has it, and its client was answered"""
    CONFIRMING = "confirming"
    """its first request verified, and the bank is asked whether its session ended meanwhile"""
    CONFIRMED = "confirmed"
    REMOVED = "removed"


class Event(StrEnum):
    INSTALLED = "charon has it, answer sent"
    GIVEN_UP = "not installed, or its request was decided otherwise"
    VERIFIED = "first request verified"
    LATE = "confirm_timeout"
    LIVES = "its session lives"
    ENDED = "its session ended or went on elsewhere"
    SUPERSEDED = "another attempt of its session was confirmed"
    GONE = "charon ended it"
    CLOSED = "the sidecar stops"


_ALIVE: Final = (State.INSTALLING, State.UNCONFIRMED, State.CONFIRMING)
_ENDS: Final = (Event.GIVEN_UP, Event.SUPERSEDED, Event.GONE, Event.CLOSED)
"""what ends it in any of these"""

REBUILT: Final = Transitions(
    State.INSTALLING,
    {
        (State.INSTALLING, Event.INSTALLED): State.UNCONFIRMED,
        (State.UNCONFIRMED, Event.VERIFIED): State.CONFIRMING,
        (State.UNCONFIRMED, Event.LATE): State.REMOVED,
        (State.CONFIRMING, Event.VERIFIED): State.CONFIRMING,
        (State.CONFIRMING, Event.LIVES): State.CONFIRMED,
        (State.CONFIRMING, Event.ENDED): State.REMOVED,
    }
    | {(state, event): State.REMOVED for event in _ENDS for state in _ALIVE},
)
