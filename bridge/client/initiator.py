"""The client's sessions, and what makes them move: the operator, a gateway that died, one that asks for it, or this
host that comes up again. How one moves is `attempt`, with the states of `attempt_state`.

Which sessions there are is known to `sessions`, where they may go to `candidates`, and when that begins by itself to
`auto_resume`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
import structlog

from bridge.charon.charon import Charon
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import Condition, IkeSa, Requests
from bridge.charon.vici_types import ConnectionInfo, SaInfo, ViciError
from bridge.charon.vpns import Vpn, vpns_of
from bridge.client.attempt import Attempt, Means
from bridge.client.auto_resume import NEWS_SECONDS, AutoResume
from bridge.client.candidates import Candidates
from bridge.client.gateway_probe import GatewayProbe
from bridge.client.ike_transport import IkeTransport
from bridge.client.metrics import ClientMetrics
from bridge.client.move_handler import MoveHandler
from bridge.client.nat_keepalive import NatKeepalive
from bridge.client.outcome import Outcome, Result
from bridge.client.reauthentication import Reauthentication
from bridge.client.sessions import Session, Sessions
from bridge.client.set_up_again import SetUpAgain
from bridge.client.stub_keeper import StubKeeper, gateway_message
from bridge.client.switchover import Switchover
from bridge.client.sync_request import Answer, SyncRequester, Target
from bridge.client.traffic_watch import LOOK_SECONDS, TrafficWatch
from bridge.config import ClientConfig
from bridge.ike.message import ExchangeType
from bridge.ike.stub_exchange import ANNOUNCING
from bridge.net.interface import Sender
from bridge.net.packet import EXCHANGE_OFFSET, Datagram
from bridge.service.tasks import end, spawn

log = structlog.get_logger()


PLACE_SECONDS = 60.0
"""how long charon may take to load the connections of the sessions that this host had"""


class Initiator:
    """Moves the sessions of one charon. Datagrams arrive through `datagrams`, charon's news through the methods of
    bridge.charon.sa_tracker.Listener."""

    def __init__(
        self,
        charon: Charon,
        sender: Sender,
        config: ClientConfig,
        metrics: ClientMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._charon = charon
        self._config = config
        self._metrics = metrics
        self._clock = clock
        self._vpns = vpns_of(config, lambda: charon.tracker.connections)
        self._last_of: dict[str, Vpn] = {}
        self._sessions = Sessions(charon, self._vpns, clock=clock, wall=wall)
        self._candidates = Candidates(charon, self._sessions)
        self.keeper = StubKeeper(
            config.held, charon.tracker, sender, self._sessions.resumable_sas, self._named, wall=wall
        )
        self.keeper.kept = self._sessions.previous
        self._switchover = Switchover(charon, self._sessions, config.resume, clock=clock, wall=wall)
        self._transport = IkeTransport(sender)
        self._requester = SyncRequester(
            self._transport, config.resume, self.keeper.stub_of, self._switchover.offer, clock=clock
        )
        self._means = Means(
            charon,
            self._candidates,
            self._requester,
            self._switchover,
            config.resume.refusal_grace,
            clock,
            self._resumed,
        )
        self._reauthentication = Reauthentication(charon, wall=wall)
        self._auto_resume = AutoResume(charon, self._sessions, lambda session: self._begin(session, None))
        self._moving: dict[Session, asyncio.Task[Outcome]] = {}
        self._gateway_probe = GatewayProbe(
            sender,
            self._transport,
            self._sessions.sa,
            self._targets,
            self._sent_away,
            probe_seconds=config.announce.probe_interval,
        )
        self._keepalive = NatKeepalive(sender, config.announce.keepalive, self._sessions.resumable_sas, self._targets)
        self._traffic = TrafficWatch(charon, self._sessions, self._set_up, clock=clock)
        self._set_up_again = SetUpAgain(
            charon, self._sessions, self._candidates, self._means, self._vpn, self._finish, self._later, clock=clock
        )
        self._move_handler = MoveHandler(
            charon.tracker, sender, self._targets, self._set_up_again.asked_away, self._sent_away
        )
        self._restored: set[bytes] = set()
        self._under_way: set[asyncio.Task[None]] = set()
        self._connections: dict[str, ConnectionInfo] = {}
        """those that were there when IKE_SAs were looked through last"""
        self.last: Outcome | None = None

    async def watch(self) -> None:
        """See that resumed sessions carry traffic, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._vpns.by_initiative and self._connections is not self._charon.tracker.connections:
                self._connections = self._charon.tracker.connections
                self._notice()
            await self._traffic.read()

    def _notice(self) -> None:
        """Take in IKE_SAs that came up before their connection was known, which no report repeats."""
        for sa in self._charon.tracker.established():
            if self.initiated(sa) and self._sessions.of(sa.id.spis) is None:
                self.changed(sa)

    async def keep_reachable(self) -> None:
        """Let announcements of the other gateways in, until it is cancelled."""
        await self._keepalive.run()

    async def restore(self) -> None:
        """Take up the sessions that were kept in the file when this host went down, and come back to those whose VPN
        resumes by itself."""
        self._sessions.unplaced = self.keeper.restore()
        deadline = self._clock() + PLACE_SECONDS
        while self._sessions.unplaced:
            restored = self._sessions.restore()
            for sa in self._charon.tracker.established():
                # those that charon still has may be authenticated until another time than it knows
                if self._sessions.of(sa.id.spis) is not None:
                    self._reauthentication.watch(sa)
            self._restored |= {session.last.id.spis for session in restored}
            wanted = [session for session in restored if self._vpn(session).resume_on_down]
            if wanted:
                await self._auto_resume.restored(wanted)
            if not self._vpns.by_initiative or self._clock() > deadline:
                self._sessions.unplaced = []
            else:
                # charon may not have loaded the connections yet that show the VPNs
                await asyncio.sleep(NEWS_SECONDS)

    async def close(self) -> None:
        """Stop; what is held on disk stays."""
        await self._gateway_probe.close()
        await self._auto_resume.close()
        await self._reauthentication.close()
        await self._candidates.close()
        await end(*self._moving.values(), *self._under_way)
        await self.keeper.close()

    def initiated(self, sa: IkeSa) -> bool:
        """Whether this host initiated an IKE_SA, or the one that it came from by rekeying, in one of its VPNs."""
        by_us = sa.id.initiator or sa.has(Condition.ORIGINAL_INITIATOR)
        return by_us and self._vpns.of(sa.connection) is not None

    def vpn_of(self, spis: bytes) -> str | None:
        """The VPN of an IKE_SA; None where it is of none."""
        session = self._sessions.of(spis)
        return session.vpn if session is not None else None

    def _vpn(self, session: Session) -> Vpn:
        """The VPN of a session, as it was last where its connection is not loaded any more."""
        vpn = self._vpns.of(session.connection)
        if vpn is not None:
            self._last_of[session.vpn] = vpn
        return vpn or self._last_of[session.vpn]

    def _named(self, sa: IkeSa, gateways: Sequence[str]) -> None:
        """The gateway of an IKE_SA names others that resume too."""
        if gateways:
            log.debug("gateways-received", connection=sa.connection, gateways=",".join(gateways), **sa.id.logged)
            self._vpns.named(sa.connection, gateways)

    # news from charon (Listener)

    def changed(self, sa: IkeSa) -> None:
        """An IKE_SA is up, or another than before."""
        known = self._sessions.of(sa.id.spis)
        if known is None and self._vpns.by_initiative and not self.initiated(sa):
            return
        session = self._sessions.changed(sa)
        if session is None:
            return
        if session is not known:
            # a Move may name a gateway by its address before the first attempt
            self._later("resolve", self._candidates.resolve(self._vpn(session)))
        if sa.requests is None and self._comes_back(session):
            sa.requests = Requests()
        if sa.resumable:
            self.keeper.changed(sa)
        self._reauthentication.watch(sa)

    def gone(self, sa: IkeSa) -> None:
        """charon ended an IKE_SA."""
        self._sessions.gone(sa)
        self.keeper.save_soon()

    def verified(self, ike_id: IkeId) -> None:
        """A request of a gateway verified."""
        self._sessions.verified(ike_id.spis)

    def down(self, info: SaInfo) -> None:
        """VICI says an IKE_SA went down. In state DELETING one of the sides wanted that; else the gateway is dead."""
        if self._sessions.is_own(info.spis):
            return
        if info.state == "DELETING":
            known = self._sessions.of(info.spis)
            sa = None if known is None else known.sas.get(info.spis, known.last)
            session = self._sessions.ended(info)
            self.keeper.save_soon()
            if session is not None:
                self._auto_resume.stop(session)
                if sa is not None and self._reauthentication.lapsed(sa):
                    self._set_up_again.lapsed(session, sa)
                elif sa is not None and self._comes_back(session):
                    self._set_up_again.deleted(session, sa)
            return
        session = self._sessions.of(info.spis)
        if session is not None and self._vpn(session).resume_on_down:
            log.info(
                "gateway-dead",
                vpn=session.vpn,
                connection=info.connection,
                gateway=info.remote.address,
                spi_i=info.spi_i.hex(),
                spi_r=info.spi_r.hex(),
            )
            self._auto_resume.start(session)

    def _comes_back(self, session: Session) -> bool:
        """Whether a session is set up again that its gateway ends."""
        return self._config.resume.after_delete == "handshake" or self._set_up_again.goes_on(session)

    def _later(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = spawn(name, work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    # news from the wire

    def datagrams(self, batch: Sequence[Datagram]) -> None:
        """What reached this host: answers to IKE_SA_INIT and INFORMATIONAL, and all of exchange type 240."""
        for datagram in batch:
            if datagram.ike[EXCHANGE_OFFSET] == ExchangeType.STUB:
                message = gateway_message(datagram.ike)
                if message is not None and message.move is not None and message.move.status in ANNOUNCING:
                    self._gateway_probe.received(message, datagram)
                elif message is not None and message.move is not None:
                    self._move_handler.asked(message)
                elif message is not None:
                    self.keeper.received(message)
            else:
                self._transport.datagram(datagram)

    # moving

    async def resume(self, connection: str | None = None, vpn: str | None = None, to: str | None = None) -> Outcome:
        """Move a session, to the gateway `to` or the first of its VPN that takes it: one of `vpn` and `connection`,
        where they are given; a session that was lost rather than one that is up; where there is none, a full handshake
        in that VPN."""
        group = next((one for one in self._vpns if self._is_meant(one, connection, vpn)), None)
        if group is None:
            reason = "vpn-not-configured" if vpn is not None else "connection-not-configured"
            if vpn is None and connection is None:
                reason = "no-ike-sa"
            return self._done(Outcome(Result.FAILED, connection, to, reason=reason, vpn=vpn))
        session = self._sessions.chosen(vpn, connection)
        if session is not None:
            return await asyncio.shield(self._begin(session, to))
        if vpn is None and connection is None:
            return self._done(Outcome(Result.FAILED, None, None, reason="no-ike-sa"))
        return await self._move(group, None, to, stay=False)

    @staticmethod
    def _is_meant(vpn: Vpn, connection: str | None, name: str | None) -> bool:
        return name in (None, vpn.name) and (connection is None or vpn.has(connection))

    def _targets(self, sa: IkeSa) -> set[str] | None:
        """The addresses that the session of an IKE_SA may go to; None where it is no session of ours."""
        session = self._sessions.of(sa.id.spis)
        if session is None:
            return None
        return {target.address for target in self._candidates.of(self._vpn(session), session, None, restored=False)}

    def _sent_away(self, sa: IkeSa, to: str | None, *, stay: bool = True) -> asyncio.Task[Outcome] | None:
        """Move a session whose gateway asked for it, or does not answer; None where it moves already."""
        session = self._sessions.of(sa.id.spis)
        return None if session is None or session in self._moving else self._begin(session, to, stay=stay)

    def _begin(self, session: Session, to: str | None, *, stay: bool = False) -> asyncio.Task[Outcome]:
        """`stay`: its gateway lives, so it stays there where the other one does not resume it."""
        task = self._moving.get(session)
        if task is None:
            work = self._move(self._vpn(session), session, to, stay=stay)
            task = spawn(f"move {session.connection}", work)
            self._moving[session] = task
            task.add_done_callback(lambda _: self._moving.pop(session, None))
        return task

    def _set_up(self, session: Session) -> None:
        """A session that does not work gets a new IKE_SA from the gateway that it is at."""
        if session not in self._moving and session.last.remote is not None:
            vpn, here = self._vpn(session), Target(session.last.remote.address, session.connection)
            work = self._finish(vpn, session, Attempt.set_up_at(self._means, vpn, session, here, "no-traffic"))
            self._moving[session] = task = spawn(f"set up {session.connection}", work)
            task.add_done_callback(lambda _: self._moving.pop(session, None))

    async def _move(self, vpn: Vpn, session: Session | None, to: str | None, *, stay: bool) -> Outcome:
        restored = session is not None and session.last.id.spis in self._restored
        return await self._finish(vpn, session, Attempt(self._means, vpn, session, to, stay=stay, restored=restored))

    async def _finish(self, vpn: Vpn, session: Session | None, attempt: Attempt) -> Outcome:
        """What becomes of an attempt, noted; nothing that goes wrong in it leaves it. A session that it takes down, so
        that another IKE_SA can take its place, comes back by itself where none does."""
        up = session is not None and session.up
        try:
            outcome = await attempt.run()
        except Exception as error:
            connection = session.connection if session is not None else None
            log.exception("move-failed", vpn=vpn.name, connection=connection)
            outcome = Outcome(Result.FAILED, connection, None, reason=f"internal: {type(error).__name__}")
        if outcome.result is not Result.FAILED and session is not None and session.up:
            await self._alone(vpn, session)
        elif up and session is not None and not session.up:
            self._auto_resume.start(session)
        return self._done(msgspec.structs.replace(outcome, vpn=vpn.name))

    async def _alone(self, vpn: Vpn, session: Session) -> None:
        try:
            await self._switchover.end_half_open(session, vpn)
        except ViciError as error:
            log.warning("half-open-not-ended", vpn=vpn.name, reason=str(error))

    def _done(self, outcome: Outcome) -> Outcome:
        self.last = outcome
        self._metrics.outcome(outcome.result, outcome.reason)
        if outcome.exchange_ms is not None:
            self._metrics.exchange_seconds.observe(outcome.exchange_ms / 1000)
        if outcome.total_ms is not None:
            self._metrics.total_seconds.observe(outcome.total_ms / 1000)
        level = log.warning if outcome.result is Result.FAILED else log.info
        logged = msgspec.structs.asdict(outcome) | {"children": ",".join(outcome.children)}
        level("moved", **{key: value for key, value in logged.items() if value})
        return outcome

    def _resumed(self, session: Session, new: IkeSa, answer: Answer) -> None:
        self._traffic.resumed(session)
        self._set_up_again.resumed(session, new)
        self._named(new, answer.gateways)
        self._reauthentication.watch(new)
        self.keeper.given(new, answer.sealed_stub, answer.lifetime)
