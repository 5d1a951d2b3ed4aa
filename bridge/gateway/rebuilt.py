"""An SA that was rebuilt here, until its first verified message."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from bridge.charon.ha_commands import Install
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.stub.stub import Stub


class State(StrEnum):
    INSTALLING = "installing"
    UNCONFIRMED = "unconfirmed"
    CONFIRMING = "confirming"
    """its first request verified, and the bank is asked whether its session ended meanwhile"""


@dataclass(slots=True, eq=False)
class Rebuilt:
    """An SA that was rebuilt here and has not carried a verified message yet."""

    digest: bytes
    """of the request"""
    response: bytes
    old: Stub
    sa: IkeSa
    install: Install
    leftovers: tuple[IkeId, ...] = ()
    """SAs here of the same session from before it was at another gateway: they go when this one is confirmed"""
    state: State = State.INSTALLING
    deadline: float = field(default=0.0)
