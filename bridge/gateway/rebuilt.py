"""An SA that was rebuilt here, until its first verified message."""

from __future__ import annotations

from dataclasses import dataclass, field

from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.install import Install
from bridge.gateway.rebuilt_state import REBUILT, Event, State
from bridge.ike.keys import Resumption
from bridge.stub.stub import Stub


@dataclass(slots=True, eq=False)
class Rebuilt:
    """An SA that was rebuilt here and has not carried a verified message yet."""

    digest: bytes
    """of the request"""
    response: bytes
    old: Stub
    sa: IkeSa
    install: Install
    resumption: Resumption
    """what all its keys come from"""
    leftovers: tuple[IkeId, ...] = ()
    """SAs here of the same session from before it was at another gateway: they go when this one is confirmed"""
    tagged: bool = True
    """its client's first requests come to this program, not to charon"""
    state: State = REBUILT.first
    deadline: float = field(default=0.0)

    def on(self, event: Event) -> None:
        """Something happened to it (bridge.gateway.rebuilt_state)."""
        self.state = REBUILT.after(self.state, event)
