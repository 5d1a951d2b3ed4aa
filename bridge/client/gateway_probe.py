"""What a client does when another gateway announces that its own has failed (docs/protocol.md, Announcement).

The client does not take the announcement's word for it: it asks its gateway, whose sidecar answers if its charon still
has the SA. Only a gateway that does not answer makes the session move, to the gateway that announced, by resumption.

    --Announcement, proven--> PROBING --Here, proven----------> STAYS: reported to the gateway that announced
                                 '--no answer to PROBES----> MOVES, or why not: reported too
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import structlog

from bridge.charon.ike_sa import IkeSa, client_sa
from bridge.client.outcome import Outcome
from bridge.ike.keys import NONCE_OCTETS
from bridge.ike.stub_exchange import MoveStatus, StubMessage, build_moving, build_probe, parse_stub_message, verify
from bridge.net.interface import Sender
from bridge.net.packet import Datagram, has_marker
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

PROBES: Final = 3
"""messages to the gateway of the SA"""
PROBE_SECONDS: Final = 0.1
"""that each of them waits for an answer"""
REMEMBERED: Final = 64
"""SAs whose last announcement is remembered"""


class ProbeState(StrEnum):
    """Of one announcement."""

    PROBING = "probing"
    STAYS = "stays"
    MOVES = "moves"


@dataclass(slots=True, eq=False)
class _Announced:
    message: StubMessage
    sa: IkeSa
    datagram: Datagram
    """how it came, and how reports go back"""
    here: asyncio.Event
    probe: StubMessage | None = None
    state: ProbeState = ProbeState.PROBING
    status: MoveStatus = MoveStatus.MOVING
    """what is reported once the state is no longer PROBING"""


class GatewayProbe:
    """Checks announcements. `find` gives the session's SA with both SPIs, up or lost; `targets` the addresses that it
    may go to, None where that is no session of ours; `begin` starts to move it, and gives None where it moves already.
    """

    def __init__(
        self,
        sender: Sender,
        find: Callable[[bytes], IkeSa | None],
        targets: Callable[[IkeSa], Collection[str] | None],
        begin: Callable[[IkeSa, str], asyncio.Task[Outcome] | None],
        *,
        random: Callable[[int], bytes] = os.urandom,
        probe_seconds: float = PROBE_SECONDS,
    ) -> None:
        self._sender = sender
        self._find = find
        self._targets = targets
        self._begin = begin
        self._random = random
        self._probe_seconds = probe_seconds
        self._announced: dict[bytes, _Announced] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """End what goes on."""
        await end(*self._tasks)

    def received(self, message: StubMessage, datagram: Datagram) -> None:
        """An Announcement or a Here, not proved yet."""
        assert message.move is not None
        if message.move.status is MoveStatus.HERE:
            self._here(message)
        elif message.move.status is MoveStatus.GONE:
            self._gone(message, datagram)

    def _here(self, message: StubMessage) -> None:
        announced = self._announced.get(message.spis)
        if announced is None or announced.probe is None or announced.here.is_set():
            return
        sa = announced.sa
        if verify(message, sa.suite.prf, sa.sk_d, before=announced.probe):
            announced.here.set()

    def _gone(self, message: StubMessage, datagram: Datagram) -> None:
        sa = self._find(message.spis)
        if sa is None or self._targets(sa) is None or not verify(message, sa.suite.prf, sa.sk_d):
            return
        last = self._announced.get(message.spis)
        if last is not None and message.message_id <= last.message.message_id:
            if message.message_id == last.message.message_id and last.state is not ProbeState.PROBING:
                # announced again, it may be: the report was lost
                self._report(last)
            return
        if last is not None and last.state is ProbeState.PROBING:
            # two gateways announce the same failure: the first is being checked
            return
        announced = _Announced(message, sa, datagram, asyncio.Event())
        self._announced.pop(message.spis, None)
        self._announced[message.spis] = announced
        while len(self._announced) > REMEMBERED:
            self._announced.pop(next(iter(self._announced)))
        task = spawn("gateway-probe", self._check(announced))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check(self, announced: _Announced) -> None:
        sa, move = announced.sa, announced.message.move
        assert move is not None
        if move.target not in (self._targets(sa) or ()):
            log.warning("announcement-refused", target=move.target, reason="it is no gateway of this session")
            announced.state, announced.status = ProbeState.STAYS, MoveStatus.NOT_CONFIGURED
            self._report(announced)
            return
        log.info("gateway-probed", announced_by=move.target, connection=sa.connection, **sa.id.logged)
        if await self._answers(announced):
            log.info("gateway-lives", announced_by=move.target, connection=sa.connection, **sa.id.logged)
            announced.state, announced.status = ProbeState.STAYS, MoveStatus.GATEWAY_LIVES
            self._report(announced)
            return
        log.warning("gateway-not-answering", announced_by=move.target, connection=sa.connection, **sa.id.logged)
        announced.state = ProbeState.MOVES
        task = self._begin(sa, move.target)
        if task is None:
            announced.status = MoveStatus.BUSY
        self._report(announced)

    async def _answers(self, announced: _Announced) -> bool:
        """Whether the gateway of the SA answers one of PROBES messages."""
        sa = announced.sa
        assert sa.local is not None
        assert sa.remote is not None
        octets = build_probe(client_sa(sa), announced.message, self._random(NONCE_OCTETS))
        announced.probe = parse_stub_message(octets)
        for _ in range(PROBES):
            try:
                self._sender.send(
                    sa.local.address,
                    sa.local.port,
                    sa.remote.address,
                    sa.remote.port,
                    octets,
                    has_marker(sa.local.port, sa.remote.port),
                )
            except OSError as error:
                log.info("probe-not-sent", gateway=sa.remote.address, reason=error.strerror, **sa.id.logged)
            try:
                async with asyncio.timeout(self._probe_seconds):
                    await announced.here.wait()
            except TimeoutError:
                continue
            return True
        return False

    def _report(self, announced: _Announced) -> None:
        sa, datagram = announced.sa, announced.datagram
        octets = build_moving(client_sa(sa), announced.message, announced.status, self._random(NONCE_OCTETS))
        try:
            self._sender.send(datagram.dst, datagram.dport, datagram.src, datagram.sport, octets, datagram.marker)
        except OSError as error:
            log.info("report-not-sent", gateway=datagram.src, reason=error.strerror, **sa.id.logged)
