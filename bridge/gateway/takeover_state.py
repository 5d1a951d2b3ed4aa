"""The states of an address that gateways share, and of a session that is taken over at it.

Everything that affects transitions is in this file. ARCHITECTURE.md shows the tables, and a test compares them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from bridge.service.transitions import Transitions


class Address(StrEnum):
    AWAY = "away"
    """another gateway has it; nothing of it leaves this host"""
    TAKING = "taking over"
    HERE = "here"


class AddressEvent(StrEnum):
    TAKEN = "takeover begins"
    DONE = "all sessions were looked at"
    YIELDED = "yield"


ADDRESS: Final = Transitions(
    Address.AWAY,
    {
        (Address.AWAY, AddressEvent.TAKEN): Address.TAKING,
        (Address.HERE, AddressEvent.TAKEN): Address.TAKING,
        (Address.TAKING, AddressEvent.DONE): Address.HERE,
        (Address.TAKING, AddressEvent.YIELDED): Address.AWAY,
        (Address.HERE, AddressEvent.YIELDED): Address.AWAY,
        (Address.AWAY, AddressEvent.YIELDED): Address.AWAY,
    },
)


class State(StrEnum):
    INSTALLING = "installing"
    REKEYING = "rekeying"
    """charon has it; its CHILD_SAs have keys that no host knows, until they are rekeyed"""
    TAKEN_OVER = "taken over"
    LEFT = "left to its client"
    """its client answers no request of this gateway; what the client sends is answered, and asked about once more"""
    GONE = "gone"


class Event(StrEnum):
    INSTALLED = "charon has it"
    REKEYED = "all its CHILD_SAs have new keys"
    SILENT = "its client answers under no message ID"
    HEARD = "its client sends something"
    REFUSED = "charon did not take it"
    ENDED = "charon ended it, or another gateway has it"


SESSION: Final = Transitions(
    State.INSTALLING,
    {
        (State.INSTALLING, Event.INSTALLED): State.REKEYING,
        (State.REKEYING, Event.REKEYED): State.TAKEN_OVER,
        (State.REKEYING, Event.SILENT): State.LEFT,
        (State.LEFT, Event.REKEYED): State.TAKEN_OVER,
        (State.LEFT, Event.HEARD): State.REKEYING,
        (State.INSTALLING, Event.REFUSED): State.GONE,
        (State.REKEYING, Event.REFUSED): State.GONE,
        (State.INSTALLING, Event.ENDED): State.GONE,
        (State.REKEYING, Event.ENDED): State.GONE,
        (State.LEFT, Event.ENDED): State.GONE,
        (State.TAKEN_OVER, Event.ENDED): State.GONE,
    },
)
