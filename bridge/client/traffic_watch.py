"""Whether a resumed session carries traffic: one that got packets before, sends them now and gets none back does not
work, whatever both sides say of it, and is set up again by a full handshake."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from bridge.charon.charon import Charon
from bridge.charon.vici_types import SaInfo, ViciError
from bridge.client.sessions import Session, Sessions

log = structlog.get_logger()

LOOK_SECONDS: Final = 3.0
"""between two looks at charon's counters"""
SILENT_SECONDS: Final = 10.0
"""for so long a resumed session may send without getting anything"""


@dataclass(slots=True, eq=False)
class _Watched:
    """A resumed session."""

    session: Session
    sending_since: float = 0.0
    """clock seconds; 0 before it sent anything"""


class TrafficWatch:
    """Reads charon's counters. `again` sets a session up again."""

    def __init__(
        self,
        charon: Charon,
        sessions: Sessions,
        again: Callable[[Session], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._charon = charon
        self._sessions = sessions
        self._again = again
        self._clock = clock
        self._watched: dict[bytes, _Watched] = {}

    def resumed(self, session: Session) -> None:
        """A session goes on with a rebuilt IKE_SA."""
        if session.received:
            self._watched[session.last.id.spis] = _Watched(session)

    async def read(self) -> None:
        """Look at charon's counters now, of the connections that sessions are on alone: as a gateway, this host may
        have a hundred thousand other IKE_SAs."""
        connections = {session.connection for session in self._sessions if session.up}
        try:
            for connection in connections if self._charon.vici.connected else ():
                self.look(await self._charon.vici.list_sas(connection))
        except ViciError as error:
            log.debug("counters-not-read", reason=str(error))

    def look(self, infos: list[SaInfo]) -> None:
        """Take in what charon lists."""
        listed = {info.spis: info for info in infos}
        self._watched = {spis: one for spis, one in self._watched.items() if spis in one.session.sas}
        for spis, info in listed.items():
            session = self._sessions.of(spis)
            if session is None:
                continue
            received = any(child.packets_in for child in info.children)
            watched = self._watched.get(spis)
            if received:
                session.received = True
                self._watched.pop(spis, None)
            elif watched is not None and any(child.packets_out for child in info.children):
                watched.sending_since = watched.sending_since or self._clock()
                if self._clock() - watched.sending_since >= SILENT_SECONDS:
                    del self._watched[spis]
                    log.warning(
                        "no-traffic-after-resumption",
                        vpn=session.vpn,
                        connection=info.connection,
                        gateway=info.remote.address,
                        **session.last.id.logged,
                    )
                    self._again(session)
