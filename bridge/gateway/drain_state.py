"""The states of one client that a drain asks to move, and how each ends.

Everything that affects transitions is in this file; what the draining itself does is in bridge.gateway.drain_run.
ARCHITECTURE.md shows the table, and a test compares them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from bridge.ike.stub_exchange import MoveStatus
from bridge.service.transitions import Transitions


class State(StrEnum):
    ASKED = "asked"
    """it was sent a Move"""
    MOVING = "moving"
    """its sidecar reports that it resumes at the target"""
    NEXT = "asked for the next target"
    ENDING = "being ended here"
    """it went on, and charon is asked to end its IKE_SA here"""
    MOVED = "moved"
    UNCONFIRMED = "not confirmed"
    """its client reports that it resumes, and the bank has a tombstone, which any process that writes to it
    could have left"""
    LEFT = "left alone"
    FAILED = "failed"


class Event(StrEnum):
    MOVING = "Moving: MOVING"
    NOT_CONFIGURED = "Moving: NOT_CONFIGURED"
    BUSY = "Moving: BUSY"
    NO_ANSWER = "Moving: NO_ANSWER"
    REFUSED = "Moving: REFUSED"
    ANOTHER = "Moving: not there, and a target is left"
    WENT_ON = "the bank says that it went on"
    UNMARKED = "the bank has a tombstone, no mark"
    ENDED = "charon ended its IKE_SA"
    NOT_ENDED = "charon was not reached"
    VANISHED = "charon does not have it any more"
    UNANSWERED = "no answer to the last Move"
    OVERDUE = "MOVE_SECONDS"


_UNDER_WAY: Final = (State.ASKED, State.MOVING)

DRAIN: Final = Transitions(
    State.ASKED,
    {
        (State.ASKED, Event.UNANSWERED): State.LEFT,
    }
    | {
        (state, event): after
        for event, after in {
            Event.MOVING: State.MOVING,
            Event.NOT_CONFIGURED: State.LEFT,
            Event.BUSY: State.LEFT,
            Event.NO_ANSWER: State.FAILED,
            Event.REFUSED: State.FAILED,
            Event.ANOTHER: State.NEXT,
            Event.WENT_ON: State.ENDING,
            Event.VANISHED: State.LEFT,
            Event.OVERDUE: State.FAILED,
        }.items()
        for state in _UNDER_WAY
    }
    | {
        (State.MOVING, Event.UNMARKED): State.UNCONFIRMED,
        (State.ENDING, Event.ENDED): State.MOVED,
        (State.ENDING, Event.NOT_ENDED): State.MOVED,
    },
)

REPORTED: Final = {
    MoveStatus.MOVING: Event.MOVING,
    MoveStatus.NOT_CONFIGURED: Event.NOT_CONFIGURED,
    MoveStatus.BUSY: Event.BUSY,
    MoveStatus.NO_ANSWER: Event.NO_ANSWER,
    MoveStatus.REFUSED: Event.REFUSED,
}
"""what a client reports"""

ELSEWHERE: Final = frozenset({Event.NOT_CONFIGURED, Event.NO_ANSWER, Event.REFUSED})
"""reports after which the session may go to another target, where one is left"""

REASONS: Final = {
    Event.NOT_CONFIGURED: "the target is none of the client's gateways",
    Event.BUSY: "the client was moving already",
    Event.NO_ANSWER: "the target did not answer the client",
    Event.REFUSED: "the target did not resume the session",
    Event.UNMARKED: "the bank has no mark that it went on, as from a target of release 0.1: its IKE_SA stays until DPD",
    Event.ENDED: "",
    Event.NOT_ENDED: "its IKE_SA is still here: charon was not reached, and the comparison with the bank tries again",
    Event.VANISHED: "the session ended, or was rekeyed",
    Event.UNANSWERED: "no sidecar at the client answered",
    Event.OVERDUE: "the client did not arrive",
}
"""of the final states, for the operator; NEXT is none of these"""
