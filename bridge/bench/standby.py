"""What a generated client does when its gateway fails or is drained, as a client's sidecar does it (docs/protocol.md):
an Announcement is checked by three Probes to the gateway, a Move is followed; then the session is resumed. No I/O.

UP --Announcement, proven--> PROBING --silence--> MOVING (the generator resumes it)
 |                              |--Not here, proven--> MOVING
 |                              '--Here, proven--> UP
 '--Move, proven-------------------------------> MOVING
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from bridge.bench.sessions import Session
from bridge.ike.keys import NONCE_OCTETS
from bridge.ike.stub_exchange import (
    MoveStatus,
    StubMessage,
    build_moving,
    build_probe,
    parse_stub_message,
    verify,
)

PROBES: Final = 3
PROBE_SECONDS: Final = 0.1

Send = Callable[[bytes, str, str], None]
"""octets, from the client's address, to a gateway's"""


@dataclass(slots=True, eq=False)
class Standby:
    """One client with a session that is up at a gateway. `next`: the same session, ready to be resumed elsewhere."""

    session: Session
    next: Session
    asked: StubMessage | None = None
    """the last Move or Announcement"""
    report: bytes = field(default=b"", repr=False)
    """how it was answered"""
    probe: StubMessage | None = None
    octets: bytes = field(default=b"", repr=False)
    probes: int = 0
    again: float = 0.0
    announced: float = 0.0
    """when the first Move or Announcement came"""


class Standbys:
    """All of them at one gateway. `resume` begins to move a session to a gateway."""

    def __init__(self, gateway: str, send: Send, resume: Callable[[Session, str], None]) -> None:
        self.by_spi: dict[bytes, Standby] = {}
        self._gateway = gateway
        self._send = send
        self._resume = resume
        self._probing: deque[Standby] = deque()
        self.contradicted = 0
        """announcements of a gateway that lives"""

    def add(self, session: Session, spi_i: bytes, ke_value: bytes) -> None:
        """A session that is up there."""
        following = session.successor(self._gateway, spi_i)
        following.ke_value = ke_value
        self.by_spi[session.spi_i] = Standby(session, following)

    def message(self, standby: Standby, data: bytes, now: float) -> None:
        """One of exchange type 240. Raises MalformedMessage."""
        message = parse_stub_message(data)
        session = standby.session
        if message.spis != session.spis or message.move is None:
            return
        if message.move.status in (MoveStatus.HERE, MoveStatus.NOT_HERE):
            if standby.probe is not None and verify(message, session.suite.prf, session.sk_d, before=standby.probe):
                standby.probe = None
                if message.move.status is MoveStatus.NOT_HERE:
                    self._move(standby)
                else:
                    self.contradicted += 1
                    self._tell(standby, MoveStatus.GATEWAY_LIVES)
            return
        if message.move.status not in (MoveStatus.GONE, MoveStatus.ASKED):
            return
        if not verify(message, session.suite.prf, session.sk_d):
            return
        if standby.asked is not None and message.message_id <= standby.asked.message_id:
            if message.message_id == standby.asked.message_id and standby.report:
                self._tell_again(standby)
            return
        standby.asked, standby.report = message, b""
        standby.announced = standby.announced or now
        if message.move.status is MoveStatus.ASKED:
            self._move(standby)
            return
        standby.octets = build_probe(session.stub_sa(self._gateway), message, os.urandom(NONCE_OCTETS))
        standby.probe = parse_stub_message(standby.octets)
        standby.probes, standby.again = 0, now
        self._probing.append(standby)

    def tick(self, now: float) -> bool:
        """Send what is due; whether there was anything."""
        busy = False
        while self._probing and self._probing[0].again <= now:
            standby = self._probing.popleft()
            if standby.probe is None:
                continue
            busy = True
            if standby.probes == PROBES:
                standby.probe = None
                self._move(standby)
                continue
            standby.probes += 1
            standby.again = now + PROBE_SECONDS
            self._send(standby.octets, standby.session.address, self._gateway)
            self._probing.append(standby)
        return busy

    def _move(self, standby: Standby) -> None:
        assert standby.asked is not None
        assert standby.asked.move is not None
        self._tell(standby, MoveStatus.MOVING)
        self._resume(standby.next, standby.asked.move.target)

    def _tell(self, standby: Standby, status: MoveStatus) -> None:
        assert standby.asked is not None
        sa = standby.session.stub_sa(self._gateway)
        standby.report = build_moving(sa, standby.asked, status, os.urandom(NONCE_OCTETS))
        self._tell_again(standby)

    def _tell_again(self, standby: Standby) -> None:
        assert standby.asked is not None
        assert standby.asked.move is not None
        # an Announcement is answered to the gateway that sent it, a Move to the gateway of the SA
        announced = standby.asked.move.status is MoveStatus.GONE
        to = standby.asked.move.target if announced else self._gateway
        self._send(standby.report, standby.session.address, to)
