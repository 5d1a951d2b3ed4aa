"""The states of a rebuilt IKE_SA in charon, from its installation until charon processes its messages.

Everything that affects transitions is in this file. ARCHITECTURE.md shows the table, and a test compares them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from bridge.service.transitions import Transitions


class State(StrEnum):
    PASSIVE = "passive"
    """charon has it and ignores its messages: the sidecar answers liveness checks and holds all else"""
    ACTIVATING = "activating"
    """the sidecar holds all requests"""
    ACTIVE = "active"
    """charon answers; the sidecar repeats its own last answer"""
    GONE = "gone"


class Event(StrEnum):
    BEGINS = "activation begins"
    DONE = "charon has it established"
    FAILED = "charon was not reached"
    ENDED = "it was removed, or its charon is gone"


ACTIVATION: Final = Transitions(
    State.PASSIVE,
    {
        (State.PASSIVE, Event.BEGINS): State.ACTIVATING,
        (State.ACTIVATING, Event.DONE): State.ACTIVE,
        (State.ACTIVATING, Event.FAILED): State.PASSIVE,
    }
    | {(state, Event.ENDED): State.GONE for state in (State.PASSIVE, State.ACTIVATING, State.ACTIVE)},
)
