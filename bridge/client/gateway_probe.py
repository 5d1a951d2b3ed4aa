"""What a client does when another gateway announces that its own has failed (docs/protocol.md, Announcement).

The client does not take the announcement's word for it: it asks its gateway, whose sidecar answers whether its charon
still has the SA. Where the sidecar does not answer, charon itself may (bridge.ike.version_probe), which proves nothing
but keeps the session where it is: a forged answer leaves the client to its dead peer detection. Only a gateway that
does not answer at all, or says itself that it has lost the SA, makes the session move, to the gateway that announced.

    --Announcement, proven--> PROBING --Here, proven----------------> STAYS: reported to the gateway that announced
                                 |--Not here, proven-------------> MOVES, or why not: reported too
                                 |--PROBES, charon alone answers-> STAYS: reported
                                 '--PROBES, no answer------------> MOVES, or why not: reported

Where the gateway that announced does not resume it after all (it may have too much to do for now), the session would be
left at a gateway that does not answer, until charon notices. So the gateway is probed again, and while it does not
answer, all others are tried; at last by a full handshake.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from random import uniform
from typing import Final, Protocol

import structlog

from bridge.charon.ike_sa import IkeSa, client_sa
from bridge.client.ike_transport import IkeTransport
from bridge.client.outcome import Outcome, Result
from bridge.ike.keys import NONCE_OCTETS
from bridge.ike.stub_exchange import MoveStatus, StubMessage, build_moving, build_probe, parse_stub_message, verify
from bridge.ike.version_probe import SPI_OCTETS, answers_version_probe, build_version_probe
from bridge.net.interface import Sender
from bridge.net.packet import Datagram, has_marker
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

PROBES: Final = 3
"""messages to the gateway of the SA"""
AGAIN_SECONDS: Final = (1.0, 2.0, 4.0)
"""after an attempt that failed, until the gateway is probed again, and the others are tried; times 1 to 2, since many
clients are in that position at a time"""
REMEMBERED: Final = 64
"""SAs whose last announcement is remembered"""


class Begin(Protocol):
    """Starts to move a session."""

    def __call__(self, sa: IkeSa, to: str | None, *, stay: bool) -> asyncio.Task[Outcome] | None: ...


class Answer(StrEnum):
    """What a gateway answers."""

    NONE = "none"
    DAEMON = "daemon"
    """charon alone, unproven"""
    HERE = "here"
    NOT_HERE = "not-here"


class ProbeState(StrEnum):
    """Of one announcement."""

    PROBING = "probing"
    STAYS = "stays"
    MOVES = "moves"


ANSWERS: Final = {MoveStatus.HERE: Answer.HERE, MoveStatus.NOT_HERE: Answer.NOT_HERE}
"""to a Probe, by the status of the message"""
STAYS: Final = {Answer.HERE: MoveStatus.GATEWAY_LIVES, Answer.DAEMON: MoveStatus.DAEMON_ANSWERS}
"""what keeps a session at its gateway, and how it is reported"""


@dataclass(slots=True, eq=False)
class _Announced:
    message: StubMessage
    sa: IkeSa
    datagram: Datagram
    """how it came, and how reports go back"""
    answered: asyncio.Event
    """by Here or Not here"""
    answer: Answer = Answer.NONE
    probe: StubMessage | None = None
    state: ProbeState = ProbeState.PROBING
    status: MoveStatus = MoveStatus.MOVING
    """what is reported once the state is no longer PROBING"""


class GatewayProbe:
    """Checks announcements: each of the PROBES waits `probe_seconds` for an answer. `find` gives the session's SA with
    both SPIs, up or lost; `targets` the addresses that it may go to, None where that is no session of ours. `begin`
    starts to move it, to one address or (None) to any; with `stay`, it stays where it is if no other gateway resumes
    it. It gives None where the session moves already.
    """

    def __init__(
        self,
        sender: Sender,
        transport: IkeTransport,
        find: Callable[[bytes], IkeSa | None],
        targets: Callable[[IkeSa], Collection[str] | None],
        begin: Begin,
        *,
        random: Callable[[int], bytes] = os.urandom,
        uniform: Callable[[float, float], float] = uniform,
        probe_seconds: float,
    ) -> None:
        self._sender = sender
        self._transport = transport
        self._find = find
        self._targets = targets
        self._begin = begin
        self._random = random
        self._uniform = uniform
        self._probe_seconds = probe_seconds
        self._announced: dict[bytes, _Announced] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """End what goes on."""
        await end(*self._tasks)

    def received(self, message: StubMessage, datagram: Datagram) -> None:
        """An Announcement, a Here or a Not here, not proved yet."""
        assert message.move is not None
        if message.move.status in ANSWERS:
            self._answered(message, ANSWERS[message.move.status])
        elif message.move.status is MoveStatus.GONE:
            self._gone(message, datagram)

    def _answered(self, message: StubMessage, answer: Answer) -> None:
        announced = self._announced.get(message.spis)
        if announced is None or announced.probe is None or announced.answered.is_set():
            return
        sa = announced.sa
        if verify(message, sa.suite.prf, sa.sk_d, before=announced.probe):
            announced.answer = answer
            announced.answered.set()

    def _gone(self, message: StubMessage, datagram: Datagram) -> None:
        sa = self._find(message.spis)
        targets = self._targets(sa) if sa is not None else None
        if sa is None or targets is None or not verify(message, sa.suite.prf, sa.sk_d):
            return
        assert message.move is not None
        if datagram.src != message.move.target and datagram.src not in targets:
            # captured, and sent again with another host's address: reports would go there
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
        settled = [spis for spis, one in self._announced.items() if one.state is not ProbeState.PROBING]
        for spis in settled[: max(len(self._announced) - REMEMBERED, 0)]:
            del self._announced[spis]
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
        await self._ask(announced)
        about = {"announced_by": move.target, "connection": sa.connection, **sa.id.logged}
        if announced.answer in STAYS:
            if announced.answer is Answer.HERE:
                log.info("gateway-lives", **about)
            else:
                log.warning("gateway-lives-without-sidecar", effect="the session stays, unproven", **about)
            announced.state, announced.status = ProbeState.STAYS, STAYS[announced.answer]
            self._report(announced)
            return
        if announced.answer is Answer.NOT_HERE:
            log.warning("sa-lost", **about)
        else:
            log.warning("gateway-not-answering", **about)
        announced.state = ProbeState.MOVES
        task = self._begin(sa, move.target, stay=True)
        if task is None:
            announced.status = MoveStatus.BUSY
        self._report(announced)
        if task is not None:
            await self._follow(announced, task)

    async def _follow(self, announced: _Announced, task: asyncio.Task[Outcome]) -> None:
        """See that the session gets away from its gateway, unless that answers after all."""
        sa = announced.sa
        for number, seconds in enumerate(AGAIN_SECONDS, 1):
            outcome = await asyncio.shield(task)
            if outcome.result is not Result.FAILED or not self._concerns(announced):
                return
            if number == 1:
                announced.status = MoveStatus.NO_ANSWER if outcome.reason == "no-answer" else MoveStatus.REFUSED
                self._report(announced)
            await asyncio.sleep(seconds * self._uniform(1.0, 2.0))
            if not self._concerns(announced):
                return
            announced.answer = Answer.NONE
            announced.answered.clear()
            await self._ask(announced)
            if announced.answer in STAYS:
                log.info("gateway-lives", after="it did not answer at first", connection=sa.connection, **sa.id.logged)
                return
            again = self._begin(sa, None, stay=number < len(AGAIN_SECONDS))
            if again is None:
                return
            task = again

    def _concerns(self, announced: _Announced) -> bool:
        """Whether the session is where it was, and no later announcement is about it."""
        spis = announced.sa.id.spis
        return self._find(spis) is announced.sa and self._announced.get(spis) is announced

    async def _ask(self, announced: _Announced) -> None:
        """Find out what the gateway of the SA answers to PROBES messages, its sidecar or else its charon."""
        spi = self._random(SPI_OCTETS)
        version_probe = build_version_probe(spi)
        with self._transport.answers(spi) as answers:

            def daemon_answered() -> bool:
                while announced.answer is Answer.NONE and not answers.empty():
                    datagram = answers.get_nowait()
                    assert announced.sa.remote is not None
                    if datagram.src == announced.sa.remote.address and answers_version_probe(datagram.ike, spi):
                        announced.answer = Answer.DAEMON
                return announced.answer is Answer.DAEMON

            # charon logs each of them
            await self._probe(announced, lambda: () if daemon_answered() else (version_probe,))
            daemon_answered()

    async def _probe(self, announced: _Announced, beside: Callable[[], Collection[bytes]]) -> None:
        """Send Probes, and each time what goes beside them, until its sidecar has answered."""
        sa = announced.sa
        assert sa.local is not None
        assert sa.remote is not None
        octets = build_probe(client_sa(sa), announced.message, self._random(NONCE_OCTETS))
        announced.probe = parse_stub_message(octets)
        local, remote = sa.local, sa.remote
        marker = has_marker(local.port, remote.port)
        for _ in range(PROBES):
            try:
                for message in (octets, *beside()):
                    self._sender.send(local.address, local.port, remote.address, remote.port, message, marker)
            except OSError as error:
                log.info("probe-not-sent", gateway=remote.address, reason=error.strerror, **sa.id.logged)
            try:
                async with asyncio.timeout(self._probe_seconds):
                    await announced.answered.wait()
            except TimeoutError:
                continue
            return

    def _report(self, announced: _Announced) -> None:
        sa, datagram = announced.sa, announced.datagram
        octets = build_moving(client_sa(sa), announced.message, announced.status, self._random(NONCE_OCTETS))
        try:
            self._sender.send(datagram.dst, datagram.dport, datagram.src, datagram.sport, octets, datagram.marker)
        except OSError as error:
            log.info("report-not-sent", gateway=datagram.src, reason=error.strerror, **sa.id.logged)
