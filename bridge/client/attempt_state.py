"""The states of one attempt to move a session to another gateway, or to set it up where it cannot be resumed.

Everything that affects transitions is in this file; bridge.client.attempt does what each state is for. ARCHITECTURE.md
shows the table, and a test compares them.
"""

from __future__ import annotations

from enum import StrEnum

from bridge.service.transitions import Transitions


class State(StrEnum):
    CHOOSING = "choosing"
    """which gateways the session may go to, and whether it can be resumed"""
    ASKING = "asking"
    """gateways are asked, one after the other and then beside each other, to resume its IKE_SA; then, perhaps, the one
    that its gateway rekeyed to it"""
    SWITCHING = "switching"
    """the rebuilt IKE_SA is installed in place of the old one, and its CHILD_SAs come up"""
    DECLINED = "declined"
    """it was not resumed, and may stay where it is"""
    HANDSHAKE = "full handshake"
    RESUMED = "resumed"
    FALLBACK = "fallback"
    FAILED = "failed"


class Event(StrEnum):
    NO_GATEWAY = "no configured gateway"
    RESUMABLE = "it can be resumed"
    NOT_RESUMABLE = "it cannot be resumed"
    PROVEN = "proven answer"
    REFUSED = "refused"
    REKEYED = "refused, and there is its previous IKE_SA"
    NO_ANSWER = "no gateway answers"
    WORKS = "its CHILD_SAs are up"
    UNUSABLE = "charon cannot use it"
    SET_UP = "charon has set it up meanwhile"
    STAYS = "its gateway lives"
    LEAVES = "its gateway does not"
    ESTABLISHED = "a gateway takes it"
    NONE_TAKES = "no gateway takes it"


ATTEMPT = Transitions(
    State.CHOOSING,
    {
        (State.CHOOSING, Event.NO_GATEWAY): State.FAILED,
        (State.CHOOSING, Event.RESUMABLE): State.ASKING,
        (State.CHOOSING, Event.NOT_RESUMABLE): State.DECLINED,
        (State.ASKING, Event.PROVEN): State.SWITCHING,
        (State.ASKING, Event.REFUSED): State.DECLINED,
        (State.ASKING, Event.REKEYED): State.ASKING,
        (State.ASKING, Event.NO_ANSWER): State.DECLINED,
        (State.SWITCHING, Event.WORKS): State.RESUMED,
        (State.SWITCHING, Event.SET_UP): State.FALLBACK,
        (State.SWITCHING, Event.UNUSABLE): State.DECLINED,
        (State.DECLINED, Event.STAYS): State.FAILED,
        (State.DECLINED, Event.LEAVES): State.HANDSHAKE,
        (State.HANDSHAKE, Event.ESTABLISHED): State.FALLBACK,
        (State.HANDSHAKE, Event.NONE_TAKES): State.FAILED,
    },
)
