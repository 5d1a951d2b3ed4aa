"""What a client does when its gateway asks it to go on at another one (Move, bridge.ike.stub_exchange).

Only a Move that is proved under the SA's keys counts, each one once, and only to a gateway of the session's VPN. The
session moves by resumption or stays where it is: there is no reason for a new handshake until the gateway ends it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

import structlog

from bridge.charon.ike_sa import IkeSa, client_sa
from bridge.charon.sa_tracker import SaTracker
from bridge.client.outcome import Outcome, Result
from bridge.ike.keys import NONCE_OCTETS
from bridge.ike.stub_exchange import MoveStatus, StubMessage, build_moving, verify
from bridge.net.interface import Sender
from bridge.net.packet import has_marker

log = structlog.get_logger()

ANSWER_SECONDS: Final = 30.0
"""how long after a move the gateway that asked for it is still answered: the report may have been lost"""


@dataclass(slots=True, eq=False)
class _Accepted:
    """The last Move about an IKE_SA."""

    sa: IkeSa
    message: StubMessage
    status: MoveStatus
    until: float
    """how long it is answered after the SA is gone, in the handler's clock"""


class MoveHandler:
    """Follows what gateways ask. `targets` gives the addresses that the session of an IKE_SA may go to, None where that
    is no session of ours; `asked_away` hears of each IKE_SA whose gateway wants it to go; `begin` starts to move it to
    one of them, and gives None where it moves already."""

    def __init__(
        self,
        tracker: SaTracker,
        sender: Sender,
        targets: Callable[[IkeSa], Collection[str] | None],
        asked_away: Callable[[IkeSa], None],
        begin: Callable[[IkeSa, str], asyncio.Task[Outcome] | None],
        *,
        random: Callable[[int], bytes] = os.urandom,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tracker = tracker
        self._sender = sender
        self._targets = targets
        self._asked_away = asked_away
        self._begin = begin
        self._random = random
        self._clock = clock
        self._accepted: dict[bytes, _Accepted] = {}

    def asked(self, message: StubMessage) -> None:
        """A Move, not proved yet."""
        sa = self._tracker.sas.get(message.spis)
        last = self._accepted.get(message.spis)
        if sa is None:
            if last is not None and self._clock() < last.until and verify(message, last.sa.suite.prf, last.sa.sk_d):
                self._answer(message, last)
            return
        if not (sa.up and sa.resumable) or self._targets(sa) is None or not verify(message, sa.suite.prf, sa.sk_d):
            return
        if last is None or message.message_id > last.message.message_id:
            now = self._clock()
            self._accepted = {
                spis: one for spis, one in self._accepted.items() if spis in self._tracker.sas or now < one.until
            }
            last = self._accepted[message.spis] = _Accepted(sa, message, MoveStatus.MOVING, now + ANSWER_SECONDS)
            self._asked_away(sa)
            self._accept(sa, last)
        self._answer(message, last)

    def _answer(self, message: StubMessage, last: _Accepted) -> None:
        if message.message_id == last.message.message_id:
            # asked again, it may be: the report was lost
            self._report(last.sa, last)

    def _accept(self, sa: IkeSa, accepted: _Accepted) -> None:
        assert accepted.message.move is not None
        target = accepted.message.move.target
        if target not in (self._targets(sa) or ()):
            log.warning("move-refused", target=target, reason="it is no gateway of this session", **sa.id.logged)
            accepted.status = MoveStatus.NOT_CONFIGURED
            return
        log.info("move-requested", connection=sa.connection, target=target, **sa.id.logged)
        task = self._begin(sa, target)
        if task is None:
            accepted.status = MoveStatus.BUSY
            return
        task.add_done_callback(lambda done: self._done(sa, accepted, done))

    def _done(self, sa: IkeSa, accepted: _Accepted, task: asyncio.Task[Outcome]) -> None:
        accepted.until = self._clock() + ANSWER_SECONDS
        if task.cancelled() or task.result().result is not Result.FAILED:
            return
        accepted.status = MoveStatus.NO_ANSWER if task.result().reason == "no-answer" else MoveStatus.REFUSED
        if self._tracker.sas.get(sa.id.spis) is sa:
            self._report(sa, accepted)

    def _report(self, sa: IkeSa, accepted: _Accepted) -> None:
        assert sa.local is not None
        assert sa.remote is not None
        local, remote = sa.local, sa.remote
        octets = build_moving(client_sa(sa), accepted.message, accepted.status, self._random(NONCE_OCTETS))
        try:
            self._sender.send(
                local.address, local.port, remote.address, remote.port, octets, has_marker(local.port, remote.port)
            )
        except OSError as error:
            log.info("report-not-sent", gateway=remote.address, reason=error.strerror, **sa.id.logged)
