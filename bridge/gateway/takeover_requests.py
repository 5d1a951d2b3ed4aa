"""The message ID of the client's next request, which is not in the bank: the first request after the takeover has it in
its clear header, and its checksum proves it.

charon ignores a request under another ID than it expects. It gets the right one then, and gets the request again, as
it came. An ID below the stub's, minus one, is that of a request which was answered long ago: a replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog
from msgspec.structs import replace

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import HaError
from bridge.gateway.takeover_session import Session
from bridge.gateway.takeover_state import State
from bridge.ike.encrypted_payload import is_authentic
from bridge.ike.message import MalformedMessage, parse_header
from bridge.ike.transforms import UnsupportedSuite
from bridge.net.interface import Sender
from bridge.net.packet import Datagram
from bridge.service.tasks import spawn

log = structlog.get_logger()

AFTERWARDS_SECONDS: Final = 60.0
"""that a session is still watched after its client's first request verified"""


class TakeoverRequests:
    """Judges what is overheard of clients, by both SPIs of their sessions. `again` sends a datagram to charon as its
    client sent it."""

    def __init__(self, charon: Charon, again: Sender, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.corrected = 0
        """message IDs that charon got"""
        self._charon = charon
        self._again = again
        self._clock = clock
        self._sessions: dict[bytes, Session] = {}
        self._confirmed: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def watch(self, session: Session) -> None:
        """From before charon has it."""
        self._sessions[session.sa.id.spis] = session

    def forget(self, spis: bytes) -> None:
        """It is gone."""
        self._sessions.pop(spis, None)
        self._confirmed.pop(spis, None)

    def verified(self, spis: bytes) -> None:
        """charon verified a request of its client."""
        session = self._sessions.get(spis)
        if session is not None and not session.confirmed:
            session.confirmed = True
            self._confirmed[spis] = self._clock()

    def forget_old(self) -> None:
        """Those whose message IDs charon has kept by itself for a while."""
        limit = self._clock() - AFTERWARDS_SECONDS
        for spis in [spis for spis, at in self._confirmed.items() if at < limit]:
            self.forget(spis)

    def overheard(self, datagrams: Sequence[Datagram]) -> list[Session]:
        """Requests of clients, which charon gets too; gives the sessions that they are of."""
        found = []
        for datagram in datagrams:
            session = self._sessions.get(datagram.ike[:16])
            if session is None:
                continue
            found.append(session)
            session.request = datagram
            if session.state is not State.INSTALLING:
                self.judge(session)
        return found

    def judge(self, session: Session) -> None:
        """Tell charon the ID of the session's last request, if it expects another one."""
        datagram, session.request = session.request, None
        derivation, first = session.sa.derivation, session.stub.derivation
        if datagram is None or derivation is None or first is None:
            return
        # what charon has said of this request already
        self._charon.channel.receive()
        derivation = session.sa.derivation
        assert derivation is not None
        try:
            number = parse_header(datagram.ike).message_id
            floor = derivation.next_expected + 1 if session.confirmed else first.next_expected - 1
            if number == derivation.next_expected or number < floor:
                return
            if not is_authentic(session.from_peer, datagram.ike):
                return
        except (MalformedMessage, UnsupportedSuite):
            return
        session.sa.derivation = replace(derivation, next_expected=number)
        self.corrected += 1
        log.info(
            "takeover-message-id-learned",
            message_id=number,
            expected=derivation.next_expected,
            **session.sa.id.logged,
        )
        spawn("message-id", self._tell(session, number, datagram))

    async def _tell(self, session: Session, number: int, datagram: Datagram) -> None:
        try:
            await self._charon.installer.set_next_id(session.sa.id, number, own=False)
            await self._charon.channel.drained()
            self._again.send(datagram.src, datagram.sport, datagram.dst, datagram.dport, datagram.ike, datagram.marker)
        except (ChannelError, HaError, OSError) as error:
            # its client sends it again
            log.info("takeover-request-not-repeated", reason=str(error), **session.sa.id.logged)
